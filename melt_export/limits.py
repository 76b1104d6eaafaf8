"""What rounding may cost before an export refuses it; the reasons for the numbers: docs/quantization.md.

Knows figures, not models.
"""

from melt_runtime.contract import KVCacheKind
from melt_runtime.errors import MeltError
from melt_runtime.manifest import Manifest
from melt_runtime.measured import LossLimit

WEIGHT_LIMITS = {
    "float32": LossLimit(1e-4, 0.99),
    "float16": LossLimit(0.01, 0.97),
    "bfloat16": LossLimit(0.03, 0.95),
    "int8": LossLimit(0.05, 0.93),
    "int4": LossLimit(0.3, 0.75),
}
"""By precision of the weights, over a KV cache of the activations' type."""

CACHE_LIMITS: dict[KVCacheKind, LossLimit] = {
    "float": LossLimit(0.0, 1.0),
    "int8": LossLimit(0.05, 0.93),
    "int4": LossLimit(0.3, 0.75),
}


class LossError(MeltError):
    """Rounding costs more than is allowed; the message says how much, and what costs less."""


def loss_limit(precision: str, kv_cache: KVCacheKind) -> LossLimit:
    """The larger allowance of weights and KV cache."""
    return LossLimit(
        max(WEIGHT_LIMITS[precision].kl, CACHE_LIMITS[kv_cache].kl),
        min(WEIGHT_LIMITS[precision].greedy_agreement, CACHE_LIMITS[kv_cache].greedy_agreement),
    )


def describe_loss(manifest: Manifest, kind: KVCacheKind) -> str:
    """What a kind of KV cache costs beyond its limit, and what costs less."""
    assert manifest.quality is not None
    found = manifest.quality.kv_cache[kind]
    assert found.limit is not None
    what = f"{manifest.precision} weights" + ("" if kind == "float" else f" with an {kind} KV cache")
    fix = "a smaller --block or some layers at --layer PATTERN=int8 cost less" if kind == "float" else "int8 costs less"
    return (
        f"{what}: KL divergence from float32 {found.kl:.3g} (limit {found.limit.kl:g}), first choice equal for "
        f"{100 * found.greedy_agreement:.1f} % (limit {100 * found.limit.greedy_agreement:g} %), over "
        f"{manifest.quality.tokens} tokens of {manifest.quality.text}; {fix}, --allow-loss keeps it"
    )
