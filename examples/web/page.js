import { MeltModel } from "./melt.js";

const at = (id) => document.getElementById(id);

function fail(error) {
  at("status").textContent = error.message;
  at("status").className = "error";
}

try {
  const model = await MeltModel.load(new URL("./bundle/", import.meta.url).href);
  window.model = model;
  const { layers, hidden_size: width, trained_loops: loops } = model.shape;
  at("status").textContent = `${layers} layers of ${width}, trained with ${loops} loops, one KV cache a layer`;
  at("ask").disabled = false;
  at("form").addEventListener("submit", async (event) => {
    event.preventDefault();
    at("ask").disabled = true;
    try {
      const ids = model.encode([{ role: "user", content: at("question").value }]);
      const tokens = await model.generate(ids, { loops: Number(at("loops").value) });
      at("answer").textContent = model.decode(tokens).trim();
    } catch (error) {
      fail(error);
    }
    at("ask").disabled = false;
  });
} catch (error) {
  fail(error);
}
