// node build.mjs BUNDLE [OUT]: a static folder with the page, the libraries out of node_modules, and the bundle.

import { cp, mkdir, readFile, rm } from "node:fs/promises";
import { join } from "node:path";

const [bundle, out = "dist"] = process.argv.slice(2);
if (!bundle) {
  console.error("error: give the folder of a bundle: node build.mjs ../../build/melt-tiny");
  process.exit(1);
}
const VENDOR = {
  "onnxruntime-web/dist/ort.wasm.min.mjs": "ort.wasm.min.mjs",
  "onnxruntime-web/dist/ort-wasm-simd-threaded.mjs": "ort-wasm-simd-threaded.mjs",
  "onnxruntime-web/dist/ort-wasm-simd-threaded.wasm": "ort-wasm-simd-threaded.wasm",
  "@huggingface/tokenizers/dist/tokenizers.min.mjs": "tokenizers.min.mjs",
  "@huggingface/jinja/dist/index.js": "jinja.js",
};
const manifest = JSON.parse(await readFile(join(bundle, "manifest.json"), "utf8"));
await rm(out, { recursive: true, force: true });
await mkdir(join(out, "vendor"), { recursive: true });
for (const name of ["index.html", "page.js", "melt.js"]) await cp(new URL(name, import.meta.url), join(out, name));
for (const [source, name] of Object.entries(VENDOR)) {
  await cp(new URL(`node_modules/${source}`, import.meta.url), join(out, "vendor", name));
}
await mkdir(join(out, "bundle"));
const unused = /^loop_int/; // loops over quantized caches, which the page does not use
for (const name of ["manifest.json", ...Object.keys(manifest.files).filter((name) => !unused.test(name))]) {
  await cp(join(bundle, name), join(out, "bundle", name));
}
console.log(`${out}: serve it with any static server, for example: node serve.mjs ${out}`);
