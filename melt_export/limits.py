"""What rounding may cost before an export refuses it; the reasons for the numbers: docs/quantization.md.

Knows figures, not models.
"""

from melt_runtime.bundle.contract import KVCacheKind
from melt_runtime.bundle.manifest import Manifest
from melt_runtime.bundle.measured import CacheQuality, LossLimit
from melt_runtime.errors import MeltError

LIMITS = {
    "float32": LossLimit(1e-4, 0.99),
    "float16": LossLimit(0.01, 0.95),
    "bfloat16": LossLimit(0.03, 0.9),
    "int8": LossLimit(0.05, 0.85),
    "int4": LossLimit(0.3, 0.65),
}
"""By precision of the weights, and by that of a quantized KV cache."""


class LossError(MeltError):
    """Rounding costs more than is allowed; the message says how much, and what costs less."""


def loss_limit(precision: str, kv_cache: KVCacheKind) -> LossLimit:
    """What weights and KV cache may cost together: what the coarser of the two may alone."""
    allowed = [LIMITS[precision]] + ([LIMITS[kv_cache]] if kv_cache != "float" else [])
    return LossLimit(max(limit.kl for limit in allowed), min(limit.greedy_agreement for limit in allowed))


def describe_prompt_loss(loss: CacheQuality, tokens: int, text: str) -> str:
    """What a copy for prompts costs beyond its limit over so many tokens of a text, and what costs less."""
    fix = "leave it out with --prompts none, --allow-loss keeps it"
    return _describe("the copy for prompts costs", loss, tokens, text, fix)


def describe_loss(manifest: Manifest, kind: KVCacheKind) -> str:
    """What a kind of KV cache costs beyond its limit, and what costs less."""
    assert manifest.quality is not None
    found = manifest.quality.kv_cache[kind]
    what, fix = (
        f"{manifest.precision} weights cost",
        "--block 32 or --layer PATTERN=int8 cost less, --allow-loss keeps them",
    )
    if kind != "float":
        own = manifest.quality.kv_cache["float"].kl
        what, fix = f"an {kind} KV cache costs", f"over a float cache it is {own:.3g}, --allow-loss keeps it"
    return _describe(what, found, manifest.quality.tokens, manifest.quality.text, fix)


def _describe(what: str, found: CacheQuality, tokens: int, text: str, fix: str) -> str:
    assert found.limit is not None
    return (
        f"{what} more than is allowed: KL divergence from float32 {found.kl:.3g} (limit {found.limit.kl:g}), first "
        f"choice equal for {100 * found.greedy_agreement:.1f} % (limit {100 * found.limit.greedy_agreement:g} %), over "
        f"{tokens} tokens of {text}; {fix}"
    )
