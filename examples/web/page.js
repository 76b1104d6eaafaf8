import { MeltModel } from "./melt.js";

const at = (id) => document.getElementById(id);

function say(text, kind = "") {
  at("status").textContent = text;
  at("status").className = kind;
}

try {
  const model = await MeltModel.load(new URL("./bundle/", import.meta.url).href);
  window.model = model;
  const { layers, hidden_size: width, trained_loops: loops } = model.shape;
  const caches = model.shape.cache_kind === "shared" ? "one KV cache a layer" : "a KV cache for each loop";
  const ready = `${layers} layers of ${width}, trained with ${loops} loops, ${caches}`;
  say(ready);
  at("ask").disabled = false;
  at("form").addEventListener("submit", async (event) => {
    event.preventDefault();
    at("ask").disabled = true;
    try {
      const ids = model.encode([{ role: "user", content: at("question").value }]);
      const tokens = await model.generate(ids, { loops: Number(at("loops").value) });
      at("answer").textContent = model.decode(tokens).trim();
      say(ready);
    } catch (error) {
      say(error.message, "error");
    }
    at("ask").disabled = false;
  });
} catch (error) {
  say(error.message, "error");
}
