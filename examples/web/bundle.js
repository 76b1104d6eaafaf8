// Reads the files of a bundle as its manifest describes them. Knows nothing of ONNX Runtime.

export const SCHEMA_VERSION = 5;
const REMAKE = "export the checkpoint again with the export.py that belongs to this page";
// Sizes of a model and the most that each may be, as in the contract: a number beyond is damage.
const [DEPTH, WIDTH, TOKENS] = [2 ** 10, 2 ** 20, 2 ** 26];
const SIZES = {
  layers: DEPTH,
  hidden_size: WIDTH,
  kv_heads: WIDTH,
  head_dim: WIDTH,
  vocab_size: TOKENS,
  max_positions: TOKENS,
  trained_loops: DEPTH,
  trained_chunk: TOKENS,
};
const CACHE_KINDS = ["shared", "per_loop"];

export class MeltError extends Error {}

export const isWhole = (value, least, most = Number.MAX_SAFE_INTEGER) => Number.isInteger(value) && value >= least && value <= most;

/** The bytes of a file, and where ENTRY is given, of its size and sha256 (browsers hash on secure pages only). */
async function fetchBytes(url, entry) {
  const response = await fetch(url);
  if (!response.ok) {
    throw new MeltError(`${url} cannot be fetched (${response.status}): the bundle must lie beside the page`);
  }
  const bytes = new Uint8Array(await response.arrayBuffer());
  if (entry === undefined) return bytes;
  if (bytes.length !== entry.size) {
    throw new MeltError(`${url} has ${bytes.length} bytes, its manifest says ${entry.size}: copy the bundle again`);
  }
  if (globalThis.crypto?.subtle !== undefined) {
    const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
    const found = Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
    if (found !== entry.sha256) throw new MeltError(`${url} was altered: its sha256 is not the manifest's; copy the bundle again`);
  }
  return bytes;
}

function parseText(bytes, url) {
  try {
    return new TextDecoder("utf-8", { fatal: true }).decode(bytes);
  } catch {
    throw new MeltError(`${url} is not UTF-8: ${REMAKE}`);
  }
}

function parseObject(bytes, url) {
  let values;
  try {
    values = JSON.parse(parseText(bytes, url));
  } catch (error) {
    throw error instanceof MeltError ? error : new MeltError(`${url} is not JSON (${error.message}): ${REMAKE}`);
  }
  if (!isObject(values)) throw new MeltError(`${url} must hold a JSON object: ${REMAKE}`);
  return values;
}

const isObject = (value) => typeof value === "object" && value !== null && !Array.isArray(value);

/** The manifest of the bundle at URL, a folder with a trailing slash; every field that a page uses is checked. */
export async function fetchManifest(url) {
  const path = `${url}manifest.json`;
  const manifest = parseObject(await fetchBytes(path), path);
  if (manifest.schema_version !== SCHEMA_VERSION) {
    throw new MeltError(`${path} has schema_version ${manifest.schema_version}, this page reads ${SCHEMA_VERSION}: ${REMAKE}`);
  }
  const { model, files, activations, weight_bytes: weightBytes } = manifest;
  const faults = [];
  const check = (holds, name, rule, value) => holds || faults.push(`${name} must be ${rule}, got ${JSON.stringify(value)}`);
  check(typeof activations === "string", "activations", "a string", activations);
  check(isWhole(weightBytes, 0), "weight_bytes", "a whole number", weightBytes);
  check(isObject(model), "model", "an object", model);
  for (const [name, most] of Object.entries(SIZES)) {
    check(isWhole(model?.[name], 1, most), `model.${name}`, `a whole number from 1 to ${most}`, model?.[name]);
  }
  check(typeof model?.has_latent === "boolean", "model.has_latent", "true or false", model?.has_latent);
  check(CACHE_KINDS.includes(model?.cache_kind), "model.cache_kind", CACHE_KINDS.join(" or "), model?.cache_kind);
  check(isObject(files), "files", "an object", files);
  for (const [name, entry] of Object.entries(isObject(files) ? files : {})) {
    const described = isWhole(entry?.size, 0) && typeof entry.sha256 === "string";
    check(described, `files.${name}`, "size and sha256", entry);
  }
  if (faults.length > 0) throw new MeltError(`${path}: ${faults.join("; ")}: ${REMAKE}`);
  if (activations !== "float32") {
    throw new MeltError(`${path} has ${activations} activations, wasm computes in float32: export without --activations`);
  }
  return manifest;
}

/** Fetches files of the bundle at URL by name, as bytes, text or JSON object; each must be what MANIFEST says of it. */
export function fileReader(url, manifest) {
  const bytes = async (name) => {
    if (!Object.hasOwn(manifest.files, name)) throw new MeltError(`${url}manifest.json lists no ${name}: ${REMAKE}`);
    return fetchBytes(url + name, manifest.files[name]);
  };
  return {
    bytes,
    text: async (name) => parseText(await bytes(name), url + name),
    object: async (name) => parseObject(await bytes(name), url + name),
  };
}

/** The tokens that end an answer, out of what generation_config.json holds. */
export function stopIdsOf(settings, url) {
  const ids = settings.stop_ids ?? [];
  const holds = Array.isArray(ids) && ids.every((id) => isWhole(id, 0));
  if (!holds) throw new MeltError(`${url}generation_config.json: stop_ids must be token ids, got ${JSON.stringify(ids)}: ${REMAKE}`);
  return ids;
}
