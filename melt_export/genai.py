"""A folder that ONNX Runtime GenAI loads unchanged: one decoder graph with a fixed number of loops.

Everything happens beside the output, which appears when the decoder gives the tokens of the bundle that it is made of;
that bundle is verified against torch like any other.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from tokenizers import Tokenizer

from melt_export.bundle import ExportOptions, export_source
from melt_export.genai_graph import PAST, PRESENT, join_graphs
from melt_export.probe import choose_probe
from melt_export.record import open_runner
from melt_export.source import ExportError, Source
from melt_export.templates import special_token
from melt_export.verify import ParityError
from melt_files import partial_folder, require_absent, staged
from melt_models.configuration import MeltConfig
from melt_runtime.contract import ModelShape
from melt_runtime.manifest import (
    CHAT_TEMPLATE_NAME,
    GENAI_CONFIG_NAME,
    TOKENIZER_NAME,
    WEIGHTS_NAME,
    Manifest,
)

MODEL_NAME = "model.onnx"
_MOST_TOKENS = 4096  # GenAI allocates the whole cache at once: a default that fits a machine
_PROMPTS, _NEW_TOKENS = 3, 24


def export_genai(source: Source, out: Path, loops: int | None, options: ExportOptions) -> Manifest:
    """Writes ``model.onnx``, ``weights.data``, ``genai_config.json`` and the tokenizer.

    Args:
        source: an opened checkpoint of MELT, or of any model when ``loops`` is 1.
        out: folder to make; it must not exist.
        loops: how many the decoder runs for every token; default: as many as the model was trained with.
        options: of the weights.

    Returns:
        The manifest of the bundle that it is made of.

    Raises:
        ExportError: ``out`` exists, ``loops`` is below 1, or the model keeps a KV cache for each loop.
        ParityError: the decoder does not give the bundle's tokens, or the bundle not torch's.
    """
    require_absent(out, ExportError)
    config = source.config
    loops = config.total_ut_steps if loops is None else loops
    if loops < 1:
        raise ExportError(f"loops must be at least 1, got {loops}")
    if config.cache_kind == "per_loop" and loops > 1:
        raise ExportError(
            f"--format genai has one KV cache a layer, and a LoopLM with {loops} loops "
            "needs one for each loop: train it to MELT first (docs/training.md), or give --loops 1"
        )
    if options.dtype == "bfloat16":
        raise ExportError("--format genai is compared on this machine, which cannot run bfloat16: choose float16")
    with partial_folder(out.parent, out.name) as place:
        bundle = place / "bundle"
        step = replace(options, quantized_caches=False, report=lambda line: _report(options, line, bundle))
        manifest = export_source(source, bundle, step)
        with staged(out) as folder:
            options.report(f"joining the graphs to a decoder of {loops} loops")
            parts = {name: ir.load(bundle / f"{name}.onnx") for name in ("embed", "loop", "head")}
            decoder = join_graphs(parts, manifest.model, manifest.activations, loops)
            ir.save(decoder, folder / MODEL_NAME)
            _write_texts(source, folder, manifest.model)
            answers = _bundle_answers(source, bundle, manifest, loops, options) if options.verified else []
            (bundle / WEIGHTS_NAME).rename(folder / WEIGHTS_NAME)  # the bundle is only a step on the way
            if options.verified:
                options.report("comparing the decoder's tokens with the bundle's")
                _compare(folder, manifest, answers)
    options.report(f"wrote {out}")
    return manifest


def _report(options: ExportOptions, line: str, bundle: Path) -> None:
    if str(bundle) not in line:  # the bundle is only a step on the way
        options.report(line)


def _write_texts(source: Source, folder: Path, shape: ModelShape) -> None:
    """Configuration, tokenizer and chat template in the form that GenAI reads."""
    (folder / GENAI_CONFIG_NAME).write_text(
        json.dumps(genai_config(source.config, shape, source.generation.stop_ids), indent=2) + "\n"
    )
    (folder / TOKENIZER_NAME).write_text(source.tokenizer, encoding="utf-8")
    tokenizer = Tokenizer.from_str(source.tokenizer)
    names = {name: special_token(name, source.config, tokenizer) for name in ("bos_token", "eos_token", "pad_token")}
    special = {name: token for name, token in names.items() if token is not None}
    values = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    if source.chat_template:
        (folder / CHAT_TEMPLATE_NAME).write_text(source.chat_template, encoding="utf-8")


def genai_config(config: MeltConfig, shape: ModelShape, stop_ids: tuple[int, ...]) -> dict[str, Any]:
    """``genai_config.json``: greedy search, the past and present of a layer in one buffer."""
    cache = {
        f"{name}_{part}_names": f"{stem}.%d.{part}"
        for name, stem in (("past", PAST), ("present", PRESENT))
        for part in ("key", "value")
    }
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": MODEL_NAME,
        "head_size": shape.head_dim,
        "hidden_size": shape.hidden_size,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "num_hidden_layers": shape.layers,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            **{name: value for name, value in cache.items() if name.startswith("past")},
        },
        "outputs": {"logits": "logits", **{name: value for name, value in cache.items() if name.startswith("present")}},
    }
    model = {
        "type": "decoder",
        "bos_token_id": 0 if config.bos_token_id is None else config.bos_token_id,
        "eos_token_id": list(stop_ids),
        "pad_token_id": 0 if config.pad_token_id is None else config.pad_token_id,
        "vocab_size": shape.vocab_size,
        "context_length": shape.max_positions,
        "decoder": decoder,
    }
    search = {
        "do_sample": False,
        "max_length": min(_MOST_TOKENS, shape.max_positions),
        "num_beams": 1,
        "past_present_share_buffer": True,
    }
    return {"model": model, "search": search}


def _bundle_answers(
    source: Source, bundle: Path, manifest: Manifest, loops: int, options: ExportOptions
) -> list[tuple[list[int], list[int]]]:
    """Some prompts, each with the bundle's greedy tokens after it, the prompt as one chunk."""
    passages = choose_probe(source, bundle, options.text).passages[:_PROMPTS]
    prompts = [passage.ids[: max(passage.start, _NEW_TOKENS)] for passage in passages]
    longest = max(map(len, prompts))
    runner = open_runner(bundle, manifest, longest + _NEW_TOKENS, chunk=longest)
    answers = []
    for ids in prompts:
        runner.state.reset()
        tokens = [int(runner.prefill(ids, loops).argmax())]
        while len(tokens) < _NEW_TOKENS:
            tokens.append(int(runner.decode([tokens[-1]], loops)[0].argmax()))
        answers.append((ids, tokens))
    return answers


def _compare(folder: Path, manifest: Manifest, answers: list[tuple[list[int], list[int]]]) -> None:
    """Holds the decoder's greedy tokens in a shared cache against the bundle's.

    Raises:
        ParityError: they differ.
    """
    session = open_decoder(folder)
    for ids, tokens in answers:
        got = decode_greedy(session, manifest, ids, _NEW_TOKENS)
        if got != tokens:
            raise ParityError(f"the decoder gives {got}, the bundle {tokens}")


def open_decoder(folder: Path) -> ort.InferenceSession:
    """The decoder graph on the CPU."""
    return ort.InferenceSession(folder / MODEL_NAME, providers=["CPUExecutionProvider"])


def decode_greedy(session: ort.InferenceSession, manifest: Manifest, ids: list[int], new_tokens: int) -> list[int]:
    """Greedy tokens of a decoder graph, with past and present of each layer in one buffer, as GenAI does."""
    shape = manifest.model
    binding = session.io_binding()
    size = (1, shape.kv_heads, len(ids) + new_tokens, shape.head_dim)
    buffers = [
        ort.OrtValue.ortvalue_from_numpy(np.zeros(size, dtype=manifest.activations)) for _ in range(2 * shape.layers)
    ]
    names = [f"{layer}.{part}" for layer in range(shape.layers) for part in ("key", "value")]
    for name, buffer in zip(names, buffers, strict=True):
        binding.bind_ortvalue_input(f"{PAST}.{name}", buffer)
        binding.bind_ortvalue_output(f"{PRESENT}.{name}", buffer)
    tokens: list[int] = []
    fed, past = ids, 0
    while True:
        past += len(fed)
        binding.bind_cpu_input("input_ids", np.array([fed], dtype=np.int64))
        binding.bind_cpu_input("attention_mask", np.ones((1, past), dtype=np.int64))
        binding.bind_output("logits", "cpu")
        session.run_with_iobinding(binding)
        tokens.append(int(binding.get_outputs()[-1].numpy()[0, -1].argmax()))
        if len(tokens) == new_tokens:
            return tokens
        fed = tokens[-1:]
