// The chat page. What answers is engine.js: a server, or a model in the browser.

import { Conversations, asked } from "./conversations.js";
import { answer, describe } from "./engine.js";

const at = (id) => document.getElementById(id);
const conversations = new Conversations();
let trainedLoops = 1;
let running = null; // the AbortController of the answer under way

function element(name, values = {}, ...children) {
  const made = Object.assign(document.createElement(name), values);
  made.append(...children);
  return made;
}

function tinted(text, loops) {
  const made = element("span", { textContent: text, title: `${loops} of ${trainedLoops} loops` });
  made.dataset.loops = loops;
  made.style.setProperty("--share", Math.min(1, loops / trainedLoops));
  return made;
}

function figure(message) {
  const made = element("figure", { className: message.role });
  if (message.role === "user") return element("figure", { className: "user", textContent: message.content });
  for (const { text, loops } of message.pieces) made.append(tinted(text, loops));
  if (message.note) made.append(element("figcaption", { textContent: message.note }));
  return made;
}

function show() {
  const { current, all } = conversations;
  at("messages").replaceChildren(...current.messages.map(figure));
  at("messages").scrollTop = at("messages").scrollHeight;
  at("system").value = current.system;
  at("conversations").replaceChildren(
    ...all.map((one) => {
      const title = one.messages[0]?.content ?? "Empty";
      const open = element("button", { type: "button", textContent: title, onclick: () => leaveFor(() => conversations.choose(one.id)) });
      if (one === current) open.setAttribute("aria-current", "true");
      const remove = element("button", { type: "button", textContent: "×", onclick: () => leaveFor(() => conversations.remove(one.id)) });
      remove.setAttribute("aria-label", `Delete ${title}`);
      return element("li", {}, open, remove);
    }),
  );
  const busy = running !== null;
  at("send").disabled = busy;
  at("stop").disabled = !busy;
  at("retry").disabled = busy || !current.messages.length;
}

function leaveFor(change) {
  running?.abort();
  change();
  complain("");
  show();
}

function complain(message) {
  at("error").hidden = !message;
  at("error").textContent = message;
}

function depth() {
  return at("auto").checked ? "auto" : Number(at("loops").value);
}

function showDepth() {
  at("depth").textContent = at("auto").checked ? "auto" : `${at("loops").value} of ${trainedLoops} loops`;
  at("loops").disabled = at("auto").checked;
}

/** Lets the model answer the last message of the conversation. */
async function run() {
  const conversation = conversations.current;
  const own = (running = new AbortController());
  const message = { role: "assistant", content: "", pieces: [], note: "" };
  complain("");
  show();
  const place = at("messages").appendChild(figure(message));
  const began = performance.now();
  let [first, tokens, usage, reason] = [null, 0, null, ""];
  try {
    for await (const piece of answer(asked(conversation), depth(), at("key").value, own.signal)) {
      if (piece.usage) {
        usage = piece.usage;
        continue;
      }
      first ??= performance.now();
      tokens += piece.loops.length;
      if (!piece.text) continue;
      const loops = piece.loops.at(-1) ?? message.pieces.at(-1)?.loops ?? trainedLoops;
      message.content += piece.text;
      message.pieces.push({ text: piece.text, loops });
      place.append(tinted(piece.text, loops));
      at("messages").scrollTop = at("messages").scrollHeight;
    }
  } catch (error) {
    reason = error.name === "AbortError" ? "stopped" : "broken off";
    if (error.name !== "AbortError") complain(error.message);
  }
  const seconds = (performance.now() - (first ?? began)) / 1000;
  const rate = tokens > 1 ? `${((tokens - 1) / seconds).toFixed(1)} tokens/s` : "";
  const loops = usage ? `${usage.loops_per_token.toFixed(2)} loops a token` : "";
  const cached = usage?.prompt_tokens_details?.cached_tokens;
  message.note = [reason, rate, loops, cached ? `${cached} tokens were cached` : ""].filter(Boolean).join(" · ");
  if (message.content) conversation.messages.push(message);
  if (!conversations.keep()) complain("this browser has no more room for conversations: delete some to keep this one");
  if (running === own) running = null;
  show();
}

at("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const content = at("question").value.trim();
  if (!content || running) return;
  const { messages } = conversations.current;
  if (messages.at(-1)?.role === "user") messages.pop(); // it was never answered
  messages.push({ role: "user", content });
  at("question").value = "";
  conversations.keep();
  run();
});
at("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    at("ask").requestSubmit();
  }
});
document.addEventListener("keydown", (event) => event.key === "Escape" && running?.abort());
at("stop").addEventListener("click", () => running?.abort());
at("retry").addEventListener("click", () => {
  const { messages } = conversations.current;
  if (messages.at(-1)?.role === "assistant") messages.pop();
  run();
});
at("new").addEventListener("click", () => {
  leaveFor(() => conversations.add());
  at("question").focus();
});
at("system").addEventListener("input", () => {
  conversations.current.system = at("system").value;
  conversations.keep();
});
at("key").addEventListener("change", begin);
for (const id of ["loops", "auto"]) at(id).addEventListener("input", showDepth);

async function begin() {
  try {
    const model = await describe(at("key").value);
    trainedLoops = model.trainedLoops;
    at("model").textContent = document.title = model.name;
    at("facts").textContent = model.facts;
    at("auto").closest("label").hidden = !model.hasAuto;
    at("key").closest("label").hidden = !model.hasKey;
    at("loops").max = trainedLoops;
    at("loops").value = trainedLoops;
    at("scale").replaceChildren(...Array.from({ length: trainedLoops }, (_, place) => tinted(`${place + 1}`, place + 1)));
    complain("");
  } catch (error) {
    complain(error.message);
  }
  showDepth();
  show();
}

begin();
at("question").focus();
