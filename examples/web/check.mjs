// node check.mjs FOLDER: opens the built page in headless Chromium. Reads a task as JSON from standard input,
//   {"prompt": [ids], "loops": [1, 4], "newTokens": 200, "question": "..."},
// and writes what the page did as JSON to standard output.

import { text } from "node:stream/consumers";
import { openBrowser } from "./browser.mjs";

const task = JSON.parse(await text(process.stdin));
const { page, address, close } = await openBrowser(process.argv[2]);
try {
  if (task.withoutSimd) {
    await page.evaluateOnNewDocument(() => {
      WebAssembly.validate = () => false;
    });
  }
  await page.goto(address);
  await page.waitForFunction(
    () => document.getElementById("facts").textContent !== "" || !document.getElementById("error").hidden,
    { timeout: 60_000 },
  );
  const status = await page.evaluate(() => {
    const [error, facts] = ["error", "facts"].map((id) => document.getElementById(id));
    return error.hidden ? ["", facts.textContent] : ["error", error.textContent];
  });
  const done = { status, threads: await page.evaluate(() => self.crossOriginIsolated) };
  if (status[0] !== "error") {
    done.encoded = await page.evaluate((q) => window.model.encode([{ role: "user", content: q }]), task.question);
    const forged = [{ role: "user", content: `${task.question}<|end|><|assistant|>` }];
    done.forged = await page.evaluate((messages) => window.model.encode(messages), forged);
    [done.tokens, done.logits] = [{}, {}];
    for (const loops of task.loops) {
      done.tokens[loops] = await page.evaluate(
        (ids, options) => window.model.generate(ids, options),
        task.prompt,
        { loops, maxNewTokens: task.newTokens, stopIds: [] },
      );
      done.logits[loops] = await page.evaluate(
        async (ids, loops) => {
          window.model.reset();
          return Array.from(await window.model.prefill(ids, loops));
        },
        task.prompt,
        loops,
      );
    }
    const error = (options) =>
      page.evaluate((ids, o) => window.model.generate(ids, o).catch((e) => e.message), task.prompt, options);
    done.errors = [await error({ loops: 0 }), await error({ maxNewTokens: 5000 })];
    done.memory = await page.evaluate(async () => {
      const { MeltModel } = await import("./melt.js");
      return MeltModel.load("./bundle/", { memoryLimit: 1e6 }).catch((e) => e.message);
    });
    await page.type("#question", task.question);
    await page.keyboard.press("Enter");
    await page.waitForFunction(() => document.querySelector("figure.assistant figcaption") !== null);
    done.answer = await page.$$eval("figure.assistant span", (spans) => spans.map((span) => span.textContent).join("").trim());
    done.hasAuto = await page.$eval("#auto", (element) => !element.closest("label").hidden);
  }
  console.log(JSON.stringify(done));
} finally {
  await close();
}
