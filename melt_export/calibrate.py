"""Scales of the quantized KV caches, from keys and values that the model itself gives.

Rows are rewritten by every loop, so the values of every loop count. A key is stored rotated: at another position its
pair of channels (i, i + dh / 2) shares the same length out differently, so both get the length's scale.
"""

import numpy as np

from melt_export.probe import Probe
from melt_export.progress import bar
from melt_runtime.bundle.contract import KVCacheKind
from melt_runtime.memory.plan import Array
from melt_runtime.runner import LoopRunner

TOKENS = 512
"""Tokens whose keys and values are looked at, at most."""

_CLIPS = {"int8": [1.0], "int4": np.linspace(1.0, 0.5, 11).tolist()}
"""Fractions of the largest magnitude that the largest code may stand for; smaller ones clip outliers."""
_LIMITS: dict[KVCacheKind, int] = {"int8": 127, "int4": 7}


def collect_rows(runner: LoopRunner, probe: Probe, loops: int) -> list[tuple[Array, Array]]:
    """Runs the probe and keeps what every loop wrote.

    Args:
        runner: over a float KV cache of one sequence.
        probe: the tokens; the first ``TOKENS`` of them count.
        loops: depth T.

    Returns:
        Keys and values of every layer, each [Hk, T * tokens, dh] float32.
    """
    state = runner.state
    found: list[tuple[list[Array], list[Array]]] = [([], []) for _ in range(state.plan.shape.layers)]
    left = TOKENS
    for passage in bar(probe.passages, "passage"):
        ids = passage.ids[:left]
        left -= len(ids)
        if not ids:
            break
        runner.reset()

        def keep(loop_idx: int, end: int = len(ids)) -> None:
            start = runner.slots[0].length
            rows = slice(start, min(start + state.plan.chunk, end))
            for layer, pair in zip(found, state.caches[state.plan.cache_set(loop_idx)], strict=True):
                for kept, buffer in zip(layer, pair, strict=True):
                    kept.append(buffer.value.numpy()[0, :, rows].astype(np.float32))

        runner.prefill(ids, loops, observe=keep)
    return [(np.concatenate(keys, axis=1), np.concatenate(values, axis=1)) for keys, values in found]


def key_scales(keys: Array, kv_cache: KVCacheKind) -> Array:
    """Scales of rotated keys [Hk, rows, dh], one for each pair of channels, [Hk, dh] float32."""
    half = keys.shape[-1] // 2
    lengths = np.hypot(keys[..., :half], keys[..., half:])
    both = np.concatenate((keys[..., :half], keys[..., half:]), axis=1)
    return np.tile(_best_scales(both, lengths.max(axis=1), kv_cache), 2)


def value_scales(values: Array, kv_cache: KVCacheKind) -> Array:
    """Scales of values [Hk, rows, dh], one for each channel, [Hk, dh] float32."""
    return _best_scales(values, np.abs(values).max(axis=1), kv_cache)


def _best_scales(rows: Array, peaks: Array, kv_cache: KVCacheKind) -> Array:
    """Of several clippings the one with the least squared error: rows [Hk, rows, n], peaks [Hk, n]."""
    limit, peaks = _LIMITS[kv_cache], np.maximum(peaks, 1e-6)
    best, scales = np.full(peaks.shape, np.inf), peaks / limit
    for clip in _CLIPS[kv_cache]:
        tried = clip * peaks / limit
        codes = np.clip(np.round(rows / tried[:, None]), -limit - 1, limit)
        error = ((codes * tried[:, None] - rows) ** 2).sum(axis=1)
        scales = np.where(error < best, tried, scales)
        best = np.minimum(best, error)
    return scales.astype(np.float32)
