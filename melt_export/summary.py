"""The lines that an export ends with: what was made, how close it is to torch, what its rounding costs."""

from pathlib import Path

from melt_runtime import Manifest


def summarize(out: Path, manifest: Manifest) -> str:
    """What was made, in a few lines."""
    lines = [f"{out}: {manifest.weight_bytes / 1e6:.2f} MB of {manifest.precision} weights"]
    parity, quality, prompts = manifest.parity, manifest.quality, manifest.prompts
    if prompts is not None:
        lines[0] += f" and {prompts.weight_bytes / 1e6:.2f} MB of {prompts.precision} ones for prompts"
    if parity is None:
        return f"{lines[0]}, not compared with torch"
    runs = parity.runs + (() if prompts is None or prompts.parity is None else prompts.parity.runs)
    closest = max((found.error / found.allowed for run in runs for found in run.tensors.values()), default=0.0)
    equal = sum(run.greedy_tokens_equal for run in runs)
    chosen = sum(run.greedy_tokens for run in runs)
    lines.append(
        f"beside torch, over {' and '.join(run.kv_cache for run in parity.runs)} KV caches: largest difference "
        f"{100 * closest:.2g} % of what is allowed, first choice equal for {equal} of {chosen} tokens"
    )
    if quality is None:
        lines[-1] += f" (the same graphs in {parity.activations}: no {manifest.activations} here); quality not measured"
        return "\n".join(lines)
    lines.append(f"beside float32, on {quality.tokens} tokens of {quality.text}:")
    for kind, found in quality.kv_cache.items():
        lost = quality.most_lost(kind)
        lines.append(
            f"  {kind} KV cache: perplexity {found.perplexity:.4g} against {quality.perplexity_of_float32:.4g}, KL "
            f"divergence {found.kl:.2g}, first choice equal for {100 * found.greedy_agreement:.1f} %"
            + (
                ""
                if lost is None
                else f", up to {lost[0]:.1f} points of exact answers lost ({lost[2]}, {lost[1]} loops)"
            )
            + ("" if kind in manifest.kv_caches else "; left out")
        )
    lines += [f"  {line}" for line in quality.describe_waves()]
    if prompts is not None:
        lines += [f"  {line}" for line in prompts.describe_quality()]
    if any(found.limit is None for found in quality.kv_cache.values()):
        lines.append(f"not judged: {quality.text} do not say what rounding costs in use; give --eval-text")
    return "\n".join(lines)
