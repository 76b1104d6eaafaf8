// node chat_page.mjs: drives the chat page of a server in headless Chromium. Standard input has a JSON line
// {"address": ..., "question": ..., "screenshot": ...}, then a line whenever the test has done its part; standard output
// gets a JSON line after each step.

import { createInterface } from "node:readline/promises";
import chromium from "@sparticuz/chromium";
import puppeteer from "puppeteer-core";

const lines = createInterface({ input: process.stdin })[Symbol.asyncIterator]();
const { address, question, screenshot } = JSON.parse((await lines.next()).value);
const tell = (values) => console.log(JSON.stringify(values));
const browser = await puppeteer.launch({
  args: ["--no-sandbox"],
  executablePath: await chromium.executablePath(),
  headless: "shell",
});
try {
  const page = await browser.newPage();
  const faults = [];
  page.on("pageerror", (error) => faults.push(String(error)));
  page.on("console", (message) => message.type() === "error" && faults.push(message.text()));
  await page.setViewport({ width: 1100, height: 800 });
  await page.goto(address);
  await page.waitForFunction(() => document.getElementById("model").textContent === "melt-tiny");

  const shown = () =>
    page.$$eval("figure", (all) =>
      all.map((one) => ({
        role: one.className,
        text: [...one.childNodes].filter((node) => node.nodeName !== "FIGCAPTION").map((node) => node.textContent).join(""),
        loops: [...one.querySelectorAll("span")].map((span) => Number(span.dataset.loops)),
        note: one.querySelector("figcaption")?.textContent ?? "",
      })),
    );
  const setDepth = (loops) =>
    page.evaluate((loops) => {
      const [slider, auto] = [document.getElementById("loops"), document.getElementById("auto")];
      auto.checked = loops === "auto";
      if (loops !== "auto") slider.value = loops;
      for (const one of [slider, auto]) one.dispatchEvent(new Event("input", { bubbles: true }));
    }, loops);
  const ask = async (text) => {
    await page.type("#question", text);
    await page.keyboard.press("Enter"); // by keyboard alone
  };
  const answered = () => page.waitForFunction(() => !document.getElementById("send").disabled);

  for (const loops of [1, 4, "auto"]) {
    await page.click("#new");
    await setDepth(loops);
    await ask(question);
    await answered();
    tell({ loops, shown: await shown(), depth: await page.$eval("#depth", (one) => one.textContent) });
  }
  if (screenshot) await page.screenshot({ path: screenshot });
  await page.click("#retry");
  await answered();
  tell({ retried: await shown() });

  await page.click("#new");
  await setDepth(4);
  await lines.next(); // passes take their time from now on
  await ask(question);
  await page.waitForSelector("figure.assistant span");
  await page.keyboard.press("Escape");
  await answered();
  tell({ stopped: await shown() });

  await page.reload();
  await page.waitForFunction(() => document.querySelectorAll("nav li").length === 4);
  const reloaded = { reloaded: await shown() };
  await page.click("nav li:last-child button");
  tell({ ...reloaded, first: await shown(), faults });

  await lines.next(); // the server is gone
  await ask(question);
  await page.waitForFunction(() => !document.getElementById("error").hidden);
  await answered();
  tell({ error: await page.$eval("#error", (one) => one.textContent), kept: await shown() });
} finally {
  await browser.close();
}
