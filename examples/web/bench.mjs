// node bench.mjs FOLDER CAPACITY LOOPS: a built page's bundle as a runtime that benchmarks ask line by line: "prefill 512" and
// "decode 64 16" are answered with milliseconds, "memory" with the peak of resident bytes of the page's process.

import { readFile } from "node:fs/promises";
import { createInterface } from "node:readline";
import { openBrowser } from "./browser.mjs";

const [folder, capacity, loops] = [process.argv[2], Number(process.argv[3]), Number(process.argv[4])];
const { page, address, pid, close } = await openBrowser(folder);
page.setDefaultTimeout(0);

/** Peak resident bytes of the largest process under PID (Linux): the one that holds the page. */
async function peakBytes(pid) {
  const children = (await readFile(`/proc/${pid}/task/${pid}/children`, "utf8")).split(" ").filter(Boolean);
  const own = /VmHWM:\s+(\d+)/.exec(await readFile(`/proc/${pid}/status`, "utf8"));
  return Math.max(own ? 1024 * Number(own[1]) : 0, ...(await Promise.all(children.map(peakBytes))));
}

try {
  await page.goto(`${address}melt.js`); // any file of the folder: the page itself would load the bundle once more
  await page.evaluate(
    async (base, capacity) => {
      const { MeltModel } = await import(`${base}melt.js`);
      window.model = await MeltModel.load(`${base}bundle/`, { capacity });
    },
    address,
    capacity,
  );
  console.log("ready");
  for await (const line of createInterface({ input: process.stdin })) {
    const [kind, count, steps] = line.split(" ");
    if (kind === "memory") {
      console.log(JSON.stringify([await peakBytes(pid)]));
      continue;
    }
    const found = await page.evaluate(
      async (kind, count, steps, loops) => {
        const { model } = window;
        const timed = async (work) => {
          const begin = performance.now();
          await work();
          return performance.now() - begin;
        };
        const prefill = () => model.prefill(Array(count).fill(5), loops);
        model.reset();
        if (kind === "prefill") return [await timed(prefill)];
        await prefill();
        const times = [];
        while (times.length < steps) times.push(await timed(() => model.step([5], loops)));
        return times;
      },
      kind,
      Number(count),
      Number(steps ?? 0),
      loops,
    );
    console.log(JSON.stringify(found));
  }
} finally {
  await close();
}
