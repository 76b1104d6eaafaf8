"""A folder that ONNX Runtime GenAI loads unchanged: one decoder graph with a fixed number of loops.

Everything happens beside the output, which appears when the decoder gives the logits of the bundle that it is made of;
that bundle is verified against torch like any other.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from tokenizers import Tokenizer

from melt_export.bundle import ExportOptions, export_source
from melt_export.genai_graph import PAST, PRESENT, join_graphs
from melt_export.probe import choose_probe
from melt_export.record import open_runner
from melt_export.source import ExportError, Source
from melt_export.templates import special_token
from melt_export.tolerances import INTEGER_PRODUCTS, PARITY
from melt_export.verify import ParityError
from melt_files import partial_folder, require_absent, staged
from melt_models.configuration import MeltConfig
from melt_runtime.bundle.contract import ACTIVATIONS, MAX_LOOPS, ModelShape
from melt_runtime.bundle.manifest import (
    CHAT_TEMPLATE_NAME,
    GENAI_CONFIG_NAME,
    TOKENIZER_NAME,
    WEIGHTS_NAME,
    Manifest,
)
from melt_runtime.device.ort import ort
from melt_runtime.memory.plan import Array
from melt_runtime.request.generation_config import GenerationConfig

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
        ExportError: ``out`` exists, or what ``decoder_loops`` refuses.
        ParityError: the decoder does not give the bundle's logits, or the bundle not torch's.
    """
    require_absent(out, ExportError)
    loops = decoder_loops(source.config, loops, options)
    with partial_folder(out.parent, out.name) as place:
        bundle = place / "bundle"
        step = replace(
            options, quantized_caches=False, prompts="none", report=lambda line: _report(options, line, bundle)
        )
        manifest = export_source(source, bundle, step)
        with staged(out) as folder:
            options.report(f"joining the graphs to a decoder of {loops} loops")
            parts = {name: ir.load(bundle / f"{name}.onnx") for name in ("embed", "loop", "head")}
            decoder = join_graphs(parts, manifest.model, manifest.activations, loops)
            ir.save(decoder, folder / MODEL_NAME)
            _write_texts(source, folder, manifest.model)
            for name in ("min_p", "stop"):
                if value := getattr(source.generation, name):
                    options.report(f"note: {name} {value!r} is left out: ONNX Runtime GenAI has no such default")
            answers = _bundle_answers(source, bundle, manifest, loops, options) if options.verified else []
            (bundle / WEIGHTS_NAME).rename(folder / WEIGHTS_NAME)  # the bundle is only a step on the way
            if options.verified:
                options.report("comparing the decoder's logits with the bundle's")
                _compare(folder, manifest, answers)
    options.report(f"wrote {out}")
    return manifest


def decoder_loops(config: MeltConfig, loops: int | None, options: ExportOptions) -> int:
    """How many loops a decoder runs; to be asked before any long work.

    Args:
        config: the model's.
        loops: what was asked for; default: as many as the model was trained with.
        options: of the weights.

    Raises:
        ExportError: ``loops`` is no whole number from 1 to ``MAX_LOOPS``, the model keeps a KV cache for each of
            several loops, a copy for prompts was asked for, or the decoder could not be compared here.
    """
    loops = config.total_ut_steps if loops is None else loops
    if not isinstance(loops, int) or isinstance(loops, bool) or not 1 <= loops <= MAX_LOOPS:
        raise ExportError(f"loops must be a whole number from 1 to {MAX_LOOPS}, got {loops!r}")
    if config.cache_kind == "per_loop" and loops > 1:
        raise ExportError(
            f"--format genai has one KV cache a layer, and a LoopLM with {loops} loops "
            "needs one for each loop: train it to MELT first (docs/training.md), or give --loops 1"
        )
    if options.prompts == "int8":
        raise ExportError("--format genai has one graph for every number of rows: leave --prompts int8 out")
    if options.dtype == "bfloat16":
        raise ExportError("--format genai is compared on this machine, which cannot run bfloat16: choose float16")
    return loops


def _report(options: ExportOptions, line: str, bundle: Path) -> None:
    if str(bundle) not in line:  # the bundle is only a step on the way
        options.report(line)


def _write_texts(source: Source, folder: Path, shape: ModelShape) -> None:
    """Configuration, tokenizer and chat template in the form that GenAI reads."""
    values = genai_config(source.config, shape, source.generation)
    (folder / GENAI_CONFIG_NAME).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    (folder / TOKENIZER_NAME).write_text(source.tokenizer, encoding="utf-8")
    tokenizer = Tokenizer.from_str(source.tokenizer)
    names = {name: special_token(name, source.config, tokenizer) for name in ("bos_token", "eos_token", "pad_token")}
    special = {name: token for name, token in names.items() if token is not None}
    values = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    if source.chat_template:
        (folder / CHAT_TEMPLATE_NAME).write_text(source.chat_template, encoding="utf-8")


def genai_config(config: MeltConfig, shape: ModelShape, settings: GenerationConfig) -> dict[str, Any]:
    """``genai_config.json``: the bundle's defaults of generation, the past and present of a layer in one buffer."""
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
        "eos_token_id": list(settings.stop_ids or ()),
        "pad_token_id": 0 if config.pad_token_id is None else config.pad_token_id,
        "vocab_size": shape.vocab_size,
        "context_length": shape.max_positions,
        "decoder": decoder,
    }
    said = {name: getattr(settings, name) for name in ("temperature", "top_k", "top_p", "repetition_penalty")}
    if not settings.temperature:  # greedy, which GenAI knows by another name
        said = {"repetition_penalty": settings.repetition_penalty}
    search = {
        "do_sample": bool(settings.temperature),
        **{name: value for name, value in said.items() if value is not None},
        "max_length": min(_MOST_TOKENS, shape.max_positions),
        "num_beams": 1,
        "past_present_share_buffer": True,
    }
    return {"model": model, "search": search}


def _bundle_answers(
    source: Source, bundle: Path, manifest: Manifest, loops: int, options: ExportOptions
) -> list[tuple[list[int], Array]]:
    """Some prompts, each with the bundle's logits [n, V] of its greedy tokens after it, the prompt as one chunk."""
    passages = choose_probe(source, bundle, options.text).passages[:_PROMPTS]
    prompts = [passage.ids[: max(passage.start, _NEW_TOKENS)] for passage in passages]
    longest = max(map(len, prompts))
    runner = open_runner(bundle, manifest, longest + _NEW_TOKENS, chunk=longest)
    answers = []
    for ids in prompts:
        runner.reset()
        logits = [runner.prefill(ids, loops).copy()]
        while len(logits) < _NEW_TOKENS:
            logits.append(runner.decode([int(logits[-1].argmax())], loops)[0].copy())
        answers.append((ids, np.stack(logits)))
    return answers


def _compare(folder: Path, manifest: Manifest, answers: list[tuple[list[int], Array]]) -> None:
    """Holds the decoder's logits in a shared cache against the bundle's, over the bundle's tokens.

    Raises:
        ParityError: they differ.
    """
    session = open_decoder(folder)
    tolerance = PARITY[manifest.activations] if manifest.precision in ACTIVATIONS else INTEGER_PRODUCTS
    for ids, expected in answers:
        actual = decode(session, manifest, ids, len(expected), expected.argmax(-1).tolist())
        error, allowed = np.abs(actual - expected).max(), tolerance.allowed(expected)
        if not error <= allowed:  # written so that NaN fails too
            place = int(np.abs(actual - expected).max(-1).argmax())
            raise ParityError(
                f"the decoder's logits differ from the bundle's by {error:.3g} at token {place} after a prompt of "
                f"{len(ids)}, tolerance {allowed:.3g}"
            )


def open_decoder(folder: Path) -> ort.InferenceSession:
    """The decoder graph on the CPU."""
    return ort.InferenceSession(folder / MODEL_NAME, providers=["CPUExecutionProvider"])


def decode(
    session: ort.InferenceSession,
    manifest: Manifest,
    ids: list[int],
    new_tokens: int,
    given: list[int] | None = None,
) -> Array:
    """Logits of a decoder graph, with past and present of each layer in one buffer, as GenAI does.

    Args:
        session: the graph.
        manifest: of the bundle that it was made of.
        ids: the prompt, run as one chunk.
        new_tokens: n, how many to choose.
        given: the tokens that were chosen; default: those of the highest logits.

    Returns:
        What each token was chosen from, [n, V] float32.
    """
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
    found: list[Array] = []
    fed, past = ids, 0
    while True:
        past += len(fed)
        binding.bind_cpu_input("input_ids", np.array([fed], dtype=np.int64))
        binding.bind_cpu_input("attention_mask", np.ones((1, past), dtype=np.int64))
        binding.bind_output("logits", "cpu")
        session.run_with_iobinding(binding)
        found.append(binding.get_outputs()[-1].numpy()[0, -1])
        if len(found) == new_tokens:
            return np.stack(found)
        fed = [int(found[-1].argmax())] if given is None else [given[len(found) - 1]]
