// Headless Chromium out of the npm registry, on a page of a folder served for as long as the browser is open.

import chromium from "@sparticuz/chromium";
import puppeteer from "puppeteer-core";
import { serve } from "./serve.mjs";

/** Opens FOLDER; gives the page, its address, the browser's process id, and what closes everything. */
export async function openBrowser(folder) {
  const server = await serve(folder);
  const browser = await puppeteer.launch({
    args: ["--no-sandbox"], // the package's own arguments turn off what a page needs to have threads
    executablePath: await chromium.executablePath(),
    headless: "shell",
  });
  const page = await browser.newPage();
  const close = async () => {
    await browser.close();
    server.close();
  };
  return { page, address: `http://localhost:${server.address().port}/`, pid: browser.process().pid, close };
}
