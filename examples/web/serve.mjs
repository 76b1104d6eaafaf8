// node serve.mjs [FOLDER] [PORT]: a static server; with its headers browsers allow threads.

import { createReadStream } from "node:fs";
import { access, constants, stat } from "node:fs/promises";
import { createServer } from "node:http";
import { extname, join, normalize } from "node:path";
import { pipeline } from "node:stream/promises";
import { fileURLToPath } from "node:url";

const TYPES = { ".html": "text/html", ".js": "text/javascript", ".mjs": "text/javascript", ".json": "application/json", ".wasm": "application/wasm" };

/** The file that a request's target names. Throws where it is no path, or its percent signs stand for no UTF-8. */
function fileOf(folder, target) {
  if (!target.startsWith("/")) throw new Error("not a path");
  const path = normalize(decodeURIComponent(new URL(`http://localhost${target}`).pathname)); // of what is above "/", "/" is left
  if (path.includes("\0")) throw new Error("not a path");
  return join(folder, path.endsWith("/") ? `${path}index.html` : path);
}

async function isReadable(file) {
  try {
    await access(file, constants.R_OK);
    return (await stat(file)).isFile();
  } catch {
    return false;
  }
}

async function answer(folder, request, response) {
  const refuse = (status, headers) => response.writeHead(status, headers).end();
  if (request.method !== "GET" && request.method !== "HEAD") return refuse(405, { Allow: "GET, HEAD" });
  let file;
  try {
    file = fileOf(folder, request.url);
  } catch {
    return refuse(400);
  }
  if (!(await isReadable(file))) return refuse(404);
  response.writeHead(200, {
    "Content-Type": TYPES[extname(file)] ?? "application/octet-stream",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
  });
  if (request.method === "HEAD") return response.end();
  try {
    await pipeline(createReadStream(file), response);
  } catch {
    response.destroy(); // the reader has left, or the file cannot be read to its end
  }
}

export function serve(folder, port = 0) {
  const server = createServer((request, response) => answer(folder, request, response));
  return new Promise((resolve, reject) => {
    server.once("error", reject);
    server.listen(port, "127.0.0.1", () => resolve(server));
  });
}

if (process.argv[1] === fileURLToPath(import.meta.url)) {
  const [folder = "dist", port = "8000"] = process.argv.slice(2);
  try {
    if (!(await isReadable(join(folder, "index.html")))) throw new Error(`${folder} has no page: make one with node build.mjs BUNDLE ${folder}`);
    const server = await serve(folder, Number(port));
    console.log(`http://localhost:${server.address().port}/`);
  } catch (error) {
    console.error(`error: ${error.message}`);
    process.exitCode = 1;
  }
}
