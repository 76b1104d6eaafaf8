// node build.mjs BUNDLE [OUT]: a static folder with the page, the libraries out of node_modules, and the bundle.

import { cp, mkdir, readFile, readdir, realpath, rm } from "node:fs/promises";
import { join, sep } from "node:path";

const OWN = ["engine.js", "melt.js", "chat.js", "bundle.js"];
const CHAT = ["index.html", "chat.css", "page.js", "conversations.js"]; // the very files that `melt serve` sends
const CHAT_FOLDER = new URL("../../runtime/melt_runtime/serve/page/", import.meta.url);
const PAGE = [...CHAT, ...OWN];
const FOLDERS = ["vendor", "bundle"];
const VENDOR = {
  "onnxruntime-web/dist/ort.wasm.min.mjs": "ort.wasm.min.mjs",
  "onnxruntime-web/dist/ort-wasm-simd-threaded.mjs": "ort-wasm-simd-threaded.mjs",
  "onnxruntime-web/dist/ort-wasm-simd-threaded.wasm": "ort-wasm-simd-threaded.wasm",
  "@huggingface/tokenizers/dist/tokenizers.min.mjs": "tokenizers.min.mjs",
  "@huggingface/jinja/dist/index.js": "jinja.js",
};
const unused = /^(loop_int|prompts)/; // loops over quantized caches and for many rows, which the page does not use

/** Names of the files to copy. */
async function filesOf(bundle) {
  const path = join(bundle, "manifest.json");
  let files;
  try {
    files = JSON.parse(await readFile(path, "utf8"))?.files;
  } catch (error) {
    throw new Error(`${path} cannot be read (${error.message}): give the folder of a bundle`);
  }
  const names = typeof files === "object" && files !== null ? Object.keys(files) : [];
  const odd = names.filter((name) => !/^[\w.-]+$/.test(name) || /^\.*$/.test(name));
  if (names.length === 0 || odd.length > 0) throw new Error(`${path}: files must name files of the bundle, got ${JSON.stringify(odd)}`);
  return ["manifest.json", ...names.filter((name) => !unused.test(name))];
}

/** Empties OUT where it holds nothing but an earlier page, and refuses anything else. */
async function clear(out, bundle) {
  let found;
  try {
    found = await readdir(out);
  } catch (error) {
    if (error.code === "ENOENT") return;
    throw error;
  }
  const own = FOLDERS.every((name) => found.includes(name)) && found.every((name) => [...PAGE, ...FOLDERS].includes(name));
  if (found.length > 0 && !own) throw new Error(`${out} is no page of this program: choose another folder, or empty it`);
  const holds = (await realpath(bundle)).startsWith((await realpath(out)) + sep);
  if (holds) throw new Error(`${out} holds the bundle itself: choose another folder`);
  for (const name of found) await rm(join(out, name), { recursive: true });
}

try {
  const [bundle, out = "dist"] = process.argv.slice(2);
  if (!bundle) throw new Error("give the folder of a bundle: node build.mjs ../../build/melt-tiny");
  const names = await filesOf(bundle);
  await clear(out, bundle);
  for (const name of FOLDERS) await mkdir(join(out, name), { recursive: true });
  for (const name of OWN) await cp(new URL(name, import.meta.url), join(out, name));
  for (const name of CHAT) await cp(new URL(name, CHAT_FOLDER), join(out, name));
  for (const [source, name] of Object.entries(VENDOR)) {
    await cp(new URL(`node_modules/${source}`, import.meta.url), join(out, "vendor", name));
  }
  for (const name of names) await cp(join(bundle, name), join(out, "bundle", name));
  console.log(`${out}: serve it with any static server, for example: node serve.mjs ${out}`);
} catch (error) {
  console.error(`error: ${error.message}`);
  process.exitCode = 1;
}
