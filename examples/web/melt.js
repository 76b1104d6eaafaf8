// A MELT bundle in the browser: T loops over one gated KV cache, driven from manifest.json.
// The graphs' inputs and outputs are those of runtime/melt_runtime/bundle/contract.py.

import * as ort from "./vendor/ort.wasm.min.mjs";
import { MeltError, fetchManifest, fileReader, isWhole, stopIdsOf } from "./bundle.js";
import { ChatEncoder } from "./chat.js";
import { Template } from "./vendor/jinja.js";
import { Tokenizer } from "./vendor/tokenizers.min.mjs";

const GRAPHS = ["embed", "loop", "head"];
const MOST_LOOPS = 1024;
// The smallest module with an instruction of wasm SIMD (i8x16.splat): valid only where the browser has it.
const SIMD = [0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 123, 3, 2, 1, 0, 10, 10, 1, 8, 0, 65, 0, 253, 15, 253, 98, 11];

function requireBrowser() {
  if (typeof WebAssembly !== "object" || !WebAssembly.validate(new Uint8Array(SIMD))) {
    throw new MeltError("this browser has no WebAssembly SIMD: use Chrome 91, Firefox 89, Safari 16.4 or newer");
  }
}

/** Compares what the manifest says of the model with the graphs' own inputs and outputs. */
function requireShape(shape, { loop, head }, url) {
  const inputs = new Map(loop.inputMetadata.map((tensor) => [tensor.name, tensor.shape]));
  const own = {
    layers: loop.inputNames.filter((name) => name.startsWith("past_key.")).length,
    hidden_size: inputs.get("hidden")?.[2],
    kv_heads: inputs.get("past_key.0")?.[1],
    head_dim: inputs.get("past_key.0")?.[3],
    vocab_size: head.outputMetadata[0].shape[2],
    has_latent: inputs.has("latent.0"),
  };
  const faults = Object.keys(own).filter((name) => own[name] !== shape[name]);
  if (faults.length > 0) {
    const found = faults.map((name) => `model.${name} must be the graphs' ${own[name]}, got ${shape[name]}`);
    throw new MeltError(`${url}manifest.json: ${found.join("; ")}: copy the bundle again`);
  }
}

/** Bytes that a model needs here: weights once for each of three sessions at most, packed again, and two caches. */
function neededBytes(manifest, capacity) {
  const { layers, kv_heads, head_dim, trained_loops, cache_kind } = manifest.model;
  const slots = cache_kind === "per_loop" ? trained_loops : 1;
  return 4 * manifest.weight_bytes + 2 * slots * layers * 2 * kv_heads * capacity * head_dim * 4;
}

function requireMemory(bytes, limit = 1e9 * (navigator.deviceMemory ?? 4)) {
  const most = Math.min(limit, 4 * 2 ** 30); // wasm addresses 32 bits
  if (bytes > most) {
    const [need, have] = [bytes, most].map((value) => `${(value / 1e6).toFixed(0)} MB`);
    throw new MeltError(
      `this model needs about ${need}, and this browser offers ${have}: export it with --precision int4, or lower the capacity`,
    );
  }
}

/** What MAKE makes of a file, where a library may refuse it. */
async function opened(url, name, make) {
  try {
    return await make(name);
  } catch (error) {
    throw error instanceof MeltError ? error : new MeltError(`${url}${name} cannot be read: ${error.message ?? error}`);
  }
}

export class MeltModel {
  /**
   * Loads a bundle.
   * @param {string} url folder of the bundle, with a trailing slash
   * @param {{capacity?: number, memoryLimit?: number}} options capacity: tokens of prompt and answer (512 at most by itself)
   */
  static async load(url, { capacity, memoryLimit } = {}) {
    requireBrowser();
    ort.env.wasm.wasmPaths = new URL("./vendor/", import.meta.url).href;
    ort.env.wasm.numThreads = self.crossOriginIsolated ? navigator.hardwareConcurrency : 1;
    const manifest = await fetchManifest(url);
    const { max_positions: most } = manifest.model;
    capacity ??= Math.min(512, most);
    if (!isWhole(capacity, 2, most)) throw new MeltError(`capacity must be a whole number from 2 to ${most}, got ${capacity}`);
    requireMemory(neededBytes(manifest, capacity), memoryLimit);
    const read = fileReader(url, manifest);
    const stopIds = stopIdsOf(await read.object("generation_config.json"), url);
    const form = await read.object("tokenizer.json");
    const source = await read.text("chat_template.jinja");
    const template = await opened(url, "chat_template.jinja", () => new Template(source));
    const chats = await opened(url, "tokenizer.json", () => new ChatEncoder(Tokenizer, form, template, source));
    const externalData = [{ path: "weights.data", data: await read.bytes("weights.data") }];
    const sessions = {};
    for (const name of GRAPHS) {
      const graph = await read.bytes(`${name}.onnx`);
      try {
        sessions[name] = await ort.InferenceSession.create(graph, { executionProviders: ["wasm"], externalData });
      } catch (error) {
        throw new MeltError(`${name}.onnx cannot be opened, most often for want of memory: ${error.message ?? error}`);
      }
    }
    requireShape(manifest.model, sessions, url);
    return new MeltModel(manifest.model, sessions, capacity, chats, stopIds);
  }

  constructor(shape, sessions, capacity, chats, stopIds) {
    Object.assign(this, { shape, sessions, capacity, chats, stopIds });
    this.hasLoopIdx = sessions.loop.inputNames.includes("loop_idx");
    this.running = false;
    this.reset();
  }

  /** Forgets every token. */
  reset() {
    this.length = 0;
    this.caches = new Map();
  }

  /** Token ids of a chat, ready for an answer. */
  encode(messages) {
    try {
      return this.chats.encode(messages);
    } catch (error) {
      throw new MeltError(`the chat template refuses these messages: ${error.message}`);
    }
  }

  decode(ids) {
    return this.chats.tokenizer.decode(ids, { skip_special_tokens: true });
  }

  /**
   * Greedy continuation of a prompt.
   * @param {number[]} ids
   * @param {{loops?: number, maxNewTokens?: number, stopIds?: number[], onToken?: (id: number) => void,
   *   signal?: AbortSignal}} options signal: ends it with an AbortError before the next token
   * @returns {Promise<number[]>} the new tokens, without the one that ended them
   */
  async generate(ids, { loops = this.shape.trained_loops, maxNewTokens = 64, stopIds = this.stopIds, onToken, signal } = {}) {
    const last = this.shape.vocab_size - 1;
    const places = Array.isArray(ids) && ids.length > 0 && ids.every((id) => isWhole(id, 0, last));
    if (!places) throw new MeltError(`the prompt must be token ids from 0 to ${last}, at least one`);
    // A LoopLM has one KV cache for each loop that it was trained with.
    const most = this.shape.cache_kind === "per_loop" ? this.shape.trained_loops : MOST_LOOPS;
    if (!isWhole(loops, 1, most)) throw new MeltError(`loops must be a whole number from 1 to ${most}, got ${loops}`);
    if (!isWhole(maxNewTokens, 1)) throw new MeltError(`maxNewTokens must be a whole number of at least 1, got ${maxNewTokens}`);
    if (ids.length + maxNewTokens > this.capacity) {
      throw new MeltError(
        `${ids.length} tokens and ${maxNewTokens} new ones exceed the capacity of ${this.capacity}: load with a larger one`,
      );
    }
    if (this.running) throw new MeltError("an answer is being made: wait for it, or load another model");
    this.running = true;
    try {
      return await this.continueGreedily(ids, loops, maxNewTokens, stopIds, onToken, signal);
    } finally {
      this.running = false;
    }
  }

  async continueGreedily(ids, loops, maxNewTokens, stopIds, onToken, signal) {
    this.reset();
    let logits = await this.prefill(ids, loops);
    const tokens = [];
    while (true) {
      signal?.throwIfAborted();
      const token = largest(logits);
      if (stopIds.includes(token)) return tokens;
      tokens.push(token);
      onToken?.(token);
      if (tokens.length === maxNewTokens) return tokens;
      logits = await this.step([token], loops);
    }
  }

  /** A prompt, chunk after chunk of the trained size; returns the logits of its last token. */
  async prefill(ids, loops) {
    let logits;
    for (let start = 0; start < ids.length; start += this.shape.trained_chunk) {
      logits = await this.step(ids.slice(start, start + this.shape.trained_chunk), loops);
    }
    return logits;
  }

  /** One chunk through all loops; returns the logits of its last token. */
  async step(ids, loops) {
    const { layers, hidden_size: width, has_latent: hasLatent } = this.shape;
    const count = ids.length;
    const embedded = await this.sessions.embed.run({ ids: new ort.Tensor("int64", ids.map(BigInt), [1, count]) });
    const state = { hidden: embedded.hidden };
    for (let layer = 0; hasLatent && layer < layers; layer++) {
      state[`latent.${layer}`] = new ort.Tensor("float32", new Float32Array(count * width), [1, count, width]);
    }
    const feeds = {
      seqlens_k: new ort.Tensor("int32", Int32Array.of(this.length + count - 1), [1]),
      total_sequence_length: new ort.Tensor("int32", Int32Array.of(this.length + count), []),
    };
    for (let loop = 0; loop < loops; loop++) {
      if (this.hasLoopIdx) feeds.loop_idx = new ort.Tensor("int64", BigInt64Array.of(BigInt(loop)), []);
      const cache = this.cacheOf(loop);
      const results = await this.sessions.loop.run({ ...feeds, ...state, ...cache });
      state.hidden = results.hidden_out;
      for (let layer = 0; layer < layers; layer++) {
        if (hasLatent) state[`latent.${layer}`] = results[`latent_out.${layer}`];
        cache[`past_key.${layer}`] = results[`present_key.${layer}`];
        cache[`past_value.${layer}`] = results[`present_value.${layer}`];
      }
    }
    this.length += count;
    const last = state.hidden.data.slice((count - 1) * width);
    const { logits } = await this.sessions.head.run({ hidden: new ort.Tensor("float32", last, [1, 1, width]) });
    return logits.data;
  }

  /** The KV cache of a loop: one for all loops (MELT), or one for each (LoopLM). */
  cacheOf(loop) {
    const slot = this.shape.cache_kind === "per_loop" ? loop : 0;
    if (!this.caches.has(slot)) {
      const dims = [1, this.shape.kv_heads, this.capacity, this.shape.head_dim];
      const size = dims.reduce((a, b) => a * b);
      const names = [...Array(this.shape.layers).keys()].flatMap((i) => [`past_key.${i}`, `past_value.${i}`]);
      this.caches.set(
        slot,
        Object.fromEntries(names.map((name) => [name, new ort.Tensor("float32", new Float32Array(size), dims)])),
      );
    }
    return this.caches.get(slot);
  }
}

function largest(logits) {
  let best = 0;
  for (let index = 1; index < logits.length; index++) {
    if (logits[index] > logits[best]) best = index;
  }
  return best;
}
