// The model in this browser, as the engine of the chat page: the same page as that of `melt serve`, without a server.

import { MeltModel } from "./melt.js";

let loading = null;

async function load() {
  loading ??= MeltModel.load(new URL("./bundle/", import.meta.url).href);
  window.model = await loading;
  return window.model;
}

/** What the page says of the model. */
export async function describe() {
  const { shape } = await load();
  const caches = shape.cache_kind === "shared" ? "one KV cache a layer" : "a KV cache for each loop";
  const facts = `${shape.layers} layers of ${shape.hidden_size}, trained with ${shape.trained_loops} loops, ${caches}`;
  return { name: "MELT in the browser", facts, trainedLoops: shape.trained_loops, hasAuto: false, hasKey: false };
}

/** Answers a chat, piece by piece: {text, loops} with the loops of each new token. */
export async function* answer(messages, loops, _key, signal) {
  const model = await load();
  const ids = model.encode(messages);
  const maxNewTokens = Math.max(1, model.capacity - ids.length);
  const pieces = [];
  let [wake, shown, tokens] = [() => {}, "", []];
  const push = (piece) => {
    pieces.push(piece);
    wake();
  };
  const onToken = (token) => {
    tokens.push(token);
    const text = model.decode(tokens);
    const isWhole = !text.endsWith("\ufffd"); // else the next token ends the character
    push({ text: isWhole ? text.slice(shown.length) : "", loops: [loops] });
    if (isWhole) shown = text;
  };
  model.generate(ids, { loops, maxNewTokens, onToken, signal }).then(
    () => {
      push({ text: model.decode(tokens).slice(shown.length), loops: [] }); // what was to become a character
      push(null);
    },
    (error) => push(error),
  );
  for (;;) {
    while (pieces.length) {
      const piece = pieces.shift();
      if (piece === null) return;
      if (piece instanceof Error || piece instanceof DOMException) throw piece;
      yield piece;
    }
    await new Promise((resolve) => (wake = resolve));
  }
}
