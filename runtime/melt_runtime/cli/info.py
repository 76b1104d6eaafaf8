"""The command ``melt info``: what a bundle holds, how close it is to torch, what its rounding costs."""

import argparse
import shutil
import textwrap
from dataclasses import asdict
from pathlib import Path

from melt_runtime.bundle.contract import KVCacheKind, ModelShape
from melt_runtime.bundle.manifest import Manifest, check_files, read_manifest
from melt_runtime.bundle.measured import Parity, Quality
from melt_runtime.cli.options import add_bundle, add_json, print_json
from melt_runtime.memory.estimate import format_bytes
from melt_runtime.progress import Line
from melt_runtime.request.generation_files import read_defaults
from melt_runtime.request.settings import describe_defaults

_EPILOG = """\
examples:
  melt info build/melt-tiny
  melt info build/melt-tiny --graphs
  melt info build/melt-tiny --json
"""
_INDENT = 12
_NARROWEST, _WIDEST = 60, 120


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``melt info``."""
    parser.description = (
        "Compare every file of a bundle with its manifest, then say what it holds: the model, its defaults, how far it "
        "was from torch, what its rounding costs."
    )
    parser.epilog = _EPILOG
    add_bundle(parser)
    add_json(parser, "the manifest and the defaults of generation")
    parser.add_argument("--graphs", action="store_true", help="list every input and output of the graphs too")


def run(args: argparse.Namespace) -> None:
    """Compares every file with the manifest, then prints what that says.

    Raises:
        BundleError: no bundle, or a damaged one.
    """
    manifest = read_manifest(args.bundle)
    with Line("B") as line:
        check_files(args.bundle, manifest, progress=line)
    if args.json:
        defaults = asdict(read_defaults(args.bundle, manifest.model))
        print_json({"manifest": asdict(manifest), "defaults": {k: v for k, v in defaults.items() if v is not None}})
        return
    width = min(max(shutil.get_terminal_size((_WIDEST, 0)).columns, _NARROWEST), _WIDEST)
    print(describe_bundle(args.bundle, manifest, args.graphs, width))


def _wrap(line: str, width: int) -> str:
    """One line of the report as several, if it is long; what a terminal would obey is shown in its place."""
    shown = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in line)
    return textwrap.fill(shown, width, subsequent_indent=" " * _INDENT, break_long_words=False, break_on_hyphens=False)


def describe_bundle(folder: Path, manifest: Manifest, graphs: bool = False, width: int = _WIDEST) -> str:
    """The report, several lines.

    Args:
        folder: the bundle.
        manifest: what it says of itself; its files were compared with it.
        graphs: list every input and output too.
        width: characters of a line.
    """
    shape, rounding = manifest.model, manifest.quantization
    lines = [
        f"bundle      {folder} (every file as the manifest has it)",
        f"model       {shape.layers} layers, hidden size {shape.hidden_size}, {shape.heads} query heads and",
        f"            {shape.kv_heads} key/value heads of {shape.head_dim}, vocabulary {shape.vocab_size}",
        f"positions   {shape.max_positions} tokens at most",
        f"loops       trained with {shape.trained_loops}; gate {shape.gate_kind}, KV cache {shape.cache_kind}",
        f"chunk       {shape.trained_chunk} tokens in parallel in prefill",
        *_defaults(folder, shape),
        f"weights     {format_bytes(manifest.weight_bytes)}, {manifest.precision} ({', '.join(rounding.formats)})",
        *(f"            layers {pattern}: {precision}" for pattern, precision in rounding.layers.items()),
        *_prompts(manifest),
        f"KV caches   {', '.join(manifest.kv_caches)}; activations {manifest.activations}",
        f"made for    {', '.join(manifest.providers)}",
        f"made by     {', '.join(f'{name} {version}' for name, version in manifest.producer.items())}",
        *_parity(manifest.parity),
        *_prompt_parity(manifest),
        *_quality(manifest.quality, manifest.kv_caches),
        *([] if manifest.prompts is None else [f"  {line}" for line in manifest.prompts.describe_quality()]),
    ]
    for name, graph in manifest.graphs.items():
        lines.append(f"{name}.onnx  {len(graph.inputs)} inputs, {len(graph.outputs)} outputs")
        if graphs:
            for mark, tensors in (("in ", graph.inputs), ("out", graph.outputs)):
                for tensor in tensors:
                    lines.append(f"  {mark} {tensor.name} {tensor.dtype} [{', '.join(map(str, tensor.shape))}]")
    return "\n".join(_wrap(line, width) for line in lines)


def _defaults(folder: Path, shape: ModelShape) -> list[str]:
    said = read_defaults(folder, shape)
    fields = describe_defaults(said, shape.trained_loops)
    return [
        f"{'defaults' if number == 0 else '':<11} {name} {value}" for number, (name, value) in enumerate(fields.items())
    ]


def _prompts(manifest: Manifest) -> list[str]:
    prompts = manifest.prompts
    if prompts is None:
        return []
    return [f"            {format_bytes(prompts.weight_bytes)} more, {prompts.precision} by column, for prompts"]


def _prompt_parity(manifest: Manifest) -> list[str]:
    if manifest.prompts is None or manifest.prompts.parity is None:
        return []
    runs = _runs(manifest.prompts.parity)
    return ["prompts     the same for the loops of passes of several rows:", *runs]


def _parity(parity: Parity | None) -> list[str]:
    if parity is None:
        return ["parity      not compared with torch"]
    return [
        f"parity      beside torch with the same weights, in {parity.activations}, every tensor after every loop:",
        *_runs(parity),
    ]


def _runs(parity: Parity) -> list[str]:
    lines = []
    for run in parity.runs:
        lines.append(
            f"  {run.kv_cache:<9} KV cache: {run.loops} loops, {run.prompt_tokens} prompt tokens in chunks of "
            f"{run.chunk}, {run.decode_tokens} decoded"
        )
        lines += [
            f"            {name:<11} {found.error:.1e} of {found.magnitude:.3g} (allowed {found.allowed:.1e})"
            for name, found in run.tensors.items()
        ]
        lines.append(f"            first choice equal: {run.greedy_tokens_equal} of {run.greedy_tokens}")
        if run.codes_equal is not None:
            lines.append(f"            codes equal: {100 * run.codes_equal:.4g} %, the others next to torch's")
    return lines


def _quality(quality: Quality | None, offered: tuple[KVCacheKind, ...]) -> list[str]:
    if quality is None:
        return ["quality     not measured"]
    lines = [
        f"quality     beside the float32 checkpoint, {quality.tokens} tokens of {quality.text}, {quality.loops} loops, "
        f"chunk {quality.chunk};",
        f"            perplexity of float32 {quality.perplexity_of_float32:.4g}",
    ]
    for kind, found in quality.kv_cache.items():
        errors = ", ".join(f"{100 * error:.2g}" for error in found.hidden_error_by_loop.values())
        lines += [
            f"  {kind:<9} KV cache: perplexity {found.perplexity:.4g}, KL divergence {found.kl:.2g}, first choice "
            f"equal for {100 * found.greedy_agreement:.1f} %",
            f"            error of the hidden state after each loop, %: {errors}",
        ]
        if found.limit is not None:
            verdict = "within" if found.within_limit else "beyond" if kind in offered else "left out: beyond"
            lines.append(
                f"            {verdict} the limit: KL divergence {found.limit.kl:g}, first choice equal for "
                f"{100 * found.limit.greedy_agreement:g} %"
            )
        lost = quality.most_lost(kind)
        if lost is not None:
            points, loops, group = lost
            lines.append(f"            costs up to {points:.1f} points of exact answers ({group}, {loops} loops)")
        for loops, groups in found.exact_match.items():
            cells = ", ".join(f"{group} {100 * value:.0f}" for group, value in groups.items())
            lines.append(f"            exact match with {loops} loops, %: {cells}")
    return lines + [f"  {line}" for line in quality.describe_waves()]
