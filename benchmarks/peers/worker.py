"""One runtime in a process of its own: loads a model, then measures what it is told, line by line.

    python benchmarks/peers/worker.py RUNTIME MODEL THREADS [LOOPS]

A line ``decode 64 16`` decodes 16 tokens after 64 and answers with the milliseconds of each, as JSON; ``prefill 512``
processes 512 tokens from an empty cache and answers with its milliseconds; ``memory`` is answered with the peak of
resident bytes. LOOPS (default 1) is for melt-onnx; the depth of the others is that of their files.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # before GenAI or optimum is imported
CAPACITY = 1024
CHUNK = 256
"""Tokens that we process in parallel: attention sees the whole chunk, so that long ones cost more, short ones too."""


class Llama:
    """llama.cpp, through the C functions of llama-cpp-python."""

    def __init__(self, model: Path, threads: int, kind: str):
        import llama_cpp

        self.api = llama_cpp
        self.silence = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self.silence, None)
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(
            str(model / f"{kind}.gguf").encode(), llama_cpp.llama_model_default_params()
        )
        options = llama_cpp.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch = CAPACITY, 512, 512
        options.n_threads = options.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, options)

    def reset(self) -> None:
        """Forgets every token."""
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)

    def step(self, tokens: int) -> None:
        """Processes tokens up to the logits of the last."""
        ids = (self.api.llama_token * tokens)(*([5] * tokens))
        assert self.api.llama_decode(self.context, self.api.llama_batch_get_one(ids, tokens)) == 0
        self.api.llama_synchronize(self.context)


class GenAI:
    """ONNX Runtime GenAI."""

    def __init__(self, model: Path, threads: int):
        import onnxruntime_genai

        self.api = onnxruntime_genai
        path = model / "genai" / "genai_config.json"
        config = json.loads(path.read_text())
        config["model"]["decoder"]["session_options"]["intra_op_num_threads"] = threads
        config["search"]["past_present_share_buffer"] = True
        path.write_text(json.dumps(config, indent=4))
        self.model = onnxruntime_genai.Model(str(model / "genai"))
        self.reset()

    def reset(self) -> None:
        """Forgets every token."""
        options = self.api.GeneratorParams(self.model)
        options.set_search_options(max_length=CAPACITY)
        self.generator = self.api.Generator(self.model, options)

    def step(self, tokens: int) -> None:
        """Processes tokens up to the logits of the last."""
        self.generator.append_tokens([5] * tokens)
        self.generator.get_output("logits")


class Torch:
    """transformers in bfloat16: eager, or compiled over a static cache."""

    def __init__(self, model: Path, threads: int, compiled: bool):
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        self.torch = torch
        self.model = AutoModelForCausalLM.from_pretrained(model / "hf", dtype=torch.bfloat16)
        self.compiled = compiled
        self.forward = torch.compile(self.model.forward) if compiled else self.model.forward
        self.reset()

    def reset(self) -> None:
        """Forgets every token."""
        from transformers import DynamicCache, StaticCache

        self.cache = StaticCache(self.model.config, CAPACITY) if self.compiled else DynamicCache()
        self.length = 0

    def step(self, tokens: int) -> None:
        """Processes tokens up to the logits of the last."""
        with self.torch.inference_mode():
            positions = self.torch.arange(self.length, self.length + tokens)[None]
            ids = self.torch.full((1, tokens), 5)
            self.forward(input_ids=ids, position_ids=positions, past_key_values=self.cache, logits_to_keep=1)
        self.length += tokens


class Melt:
    """This project's runtime."""

    def __init__(self, model: Path, threads: int, loops: int = 1, bundle: str = "melt"):
        from melt_runtime import MeltModel

        self.loops = loops
        loaded = MeltModel.load(model / bundle, device="cpu", capacity=CAPACITY, chunk=CHUNK, threads=threads)
        self.runner = loaded.new_runner()

    def reset(self) -> None:
        """Forgets every token."""
        self.runner.reset()

    def step(self, tokens: int) -> None:
        """Processes tokens up to the logits of the last."""
        if tokens == 1:
            self.runner.decode([5], self.loops)
        else:
            self.runner.prefill([5] * tokens, self.loops)


class Optimum:
    """``ORTModelForCausalLM``, whose cache grows by a copy at each step."""

    def __init__(self, model: Path, threads: int, reuse: bool):
        import torch
        from onnxruntime import SessionOptions
        from optimum.onnxruntime import ORTModelForCausalLM

        self.torch = torch
        options = SessionOptions()
        options.intra_op_num_threads = threads
        options.enable_mem_reuse = reuse  # planning it takes minutes for a graph of many nodes
        self.model = ORTModelForCausalLM.from_pretrained(model / "optimum", session_options=options)
        self.reset()

    def reset(self) -> None:
        """Forgets every token."""
        self.past, self.length = None, 0

    def step(self, tokens: int) -> None:
        """Processes tokens up to the logits of each."""
        self.length += tokens
        ids, mask = self.torch.full((1, tokens), 5), self.torch.ones((1, self.length), dtype=self.torch.int64)
        self.past = self.model(ids, attention_mask=mask, past_key_values=self.past).past_key_values


def peak_bytes() -> int:
    """Peak resident memory of this process (Linux)."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


RUNTIMES: dict[str, Callable] = {
    "melt-onnx": Melt,
    "melt-onnx int4": lambda model, threads: Melt(model, threads, bundle="melt-int4"),
    "melt-onnx int4 alone": lambda model, threads: Melt(model, threads, bundle="melt-int4-alone"),
    "melt-onnx int8": lambda model, threads: Melt(model, threads, bundle="melt-int8"),
    "optimum": lambda model, threads: Optimum(model, threads, reuse=False),
    "optimum, default session": lambda model, threads: Optimum(model, threads, reuse=True),
    "llama.cpp Q4_0": lambda model, threads: Llama(model, threads, "q4_0"),
    "llama.cpp Q8_0": lambda model, threads: Llama(model, threads, "q8_0"),
    "genai": GenAI,
    "torch": lambda model, threads: Torch(model, threads, compiled=False),
    "torch.compile": lambda model, threads: Torch(model, threads, compiled=True),
}


def main() -> int:
    """Serves requests until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    name, model, threads, *loops = sys.argv[1:]
    depth = [int((loops or ["1"])[0])] if name == "melt-onnx" else []
    runtime = RUNTIMES[name](Path(model), int(threads), *depth)
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        kind, *numbers = line.split()
        if kind == "memory":
            print(json.dumps([peak_bytes()]), file=answers, flush=True)
            continue
        runtime.reset()
        steps = [int(numbers[0])] if kind == "prefill" else [1] * int(numbers[1])
        if kind == "decode":
            runtime.step(int(numbers[0]))
        found = []
        for tokens in steps:
            begin = time.perf_counter()
            runtime.step(tokens)
            found.append(1e3 * (time.perf_counter() - begin))
        print(json.dumps(found), file=answers, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
