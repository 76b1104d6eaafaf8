"""The text of ``melt info``: what a bundle holds, how close it is to torch, what its rounding costs."""

from pathlib import Path
from typing import Any

from melt_runtime.manifest import Manifest
from melt_runtime.memory import format_bytes


def describe_bundle(folder: Path, manifest: Manifest, graphs: bool = False) -> str:
    """The report, several lines.

    Args:
        folder: the bundle.
        manifest: what it says of itself; its files were compared with it.
        graphs: list every input and output too.
    """
    shape, rounding = manifest.model, manifest.quantization
    lines = [
        f"bundle      {folder} (every file as the manifest has it)",
        f"model       {shape.layers} layers, hidden size {shape.hidden_size}, {shape.heads} query heads and",
        f"            {shape.kv_heads} key/value heads of {shape.head_dim}, vocabulary {shape.vocab_size}",
        f"positions   {shape.max_positions} tokens at most",
        f"loops       trained with {shape.trained_loops}; gate {shape.gate_kind}, KV cache {shape.cache_kind}",
        f"chunk       {shape.trained_chunk} tokens in parallel in prefill",
        f"weights     {format_bytes(manifest.weight_bytes)}, {manifest.precision} ({', '.join(rounding.formats)})",
        *(f"            layers {pattern}: {precision}" for pattern, precision in rounding.layers.items()),
        f"KV caches   {', '.join(manifest.kv_caches)}; activations {manifest.activations}",
        f"made for    {', '.join(manifest.providers)}",
        f"made by     {', '.join(f'{name} {version}' for name, version in manifest.producer.items())}",
        *_parity(manifest.parity),
        *_quality(manifest.quality),
    ]
    for name, graph in manifest.graphs.items():
        lines.append(f"{name}.onnx  {len(graph.inputs)} inputs, {len(graph.outputs)} outputs")
        if graphs:
            for mark, tensors in (("in ", graph.inputs), ("out", graph.outputs)):
                for tensor in tensors:
                    lines.append(f"  {mark} {tensor.name} {tensor.dtype} [{', '.join(map(str, tensor.shape))}]")
    return "\n".join(lines)


def _parity(parity: dict[str, Any]) -> list[str]:
    if not parity:
        return ["parity      not compared with torch"]
    lines = [
        f"parity      largest difference from torch with the same weights, after any of {parity['loops']} loops,",
        f"            {parity['prompt_tokens']} prompt tokens in chunks of {parity['chunk']}, "
        f"{parity['decode_tokens']} decoded tokens:",
        f"            tolerance   {parity['tolerance']:g}",
    ]
    lines += [f"            {name:<11} {error:.1e}" for name, error in parity["max_abs_error"].items()]
    lines.append(f"            greedy tokens equal: {parity['greedy_tokens_equal']} of {parity['decode_tokens']}")
    if "activations" in parity:
        lines.append("            of the same graphs in float32, where these could not run")
    return lines


def _quality(quality: dict[str, Any]) -> list[str]:
    if not quality:
        return ["quality     not measured"]
    lines = [
        f"quality     beside the float32 checkpoint, {quality['tokens']} tokens of {quality['text']}, "
        f"{quality['loops']} loops, chunk {quality['chunk']};",
        f"            perplexity of float32 {quality['perplexity_of_float32']:.4g}",
    ]
    for kind, found in quality["kv_cache"].items():
        errors = ", ".join(f"{100 * error:.2g}" for error in found["hidden_error_by_loop"].values())
        lines += [
            f"  {kind:<9} KV cache: perplexity {found['perplexity']:.4g}, KL divergence {found['kl']:.2g}, first "
            f"choice equal for {100 * found['greedy_agreement']:.1f} %",
            f"            error of the hidden state after each loop, %: {errors}",
        ]
        for loops, groups in found.get("exact_match", {}).items():
            cells = ", ".join(f"{group} {100 * value:.0f}" for group, value in groups.items())
            lines.append(f"            exact match with {loops} loops, %: {cells}")
    return lines
