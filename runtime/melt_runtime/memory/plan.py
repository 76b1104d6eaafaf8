"""Sizes of a state, known before it is allocated: bytes of the KV cache and of everything else that a step touches.

Knows nothing of ONNX Runtime. Letters: ``melt_runtime.bundle.contract``.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from melt_runtime.arguments import instance, one_of, whole_number
from melt_runtime.bundle.contract import KV_CACHES, MAX_LOOPS, KVCacheKind, ModelShape, cache_tensor
from melt_runtime.bundle.manifest import Manifest
from melt_runtime.errors import CapacityError

Array = NDArray[Any]

DEFAULT_CAPACITY = 2048
"""Tokens of a session where the caller names no number and the model has as many positions."""

MOST_IN_FLIGHT = 8
"""Consecutive tokens of one sequence that share a pass over MELT's one cache, at most."""

MAX_BATCH = 4096
"""Most sequences of one state."""

_STORED_AS = {"bfloat16": "uint16"}  # numpy has no such type; the bits are the same


def stored_type(dtype: str) -> np.dtype[Any]:
    """Numpy's type of a tensor's elements, or the one that has room for them."""
    return np.dtype(_STORED_AS.get(dtype, dtype))


@dataclass(frozen=True)
class RowCounts:
    """How many tokens in flight some buffers have room for.

    Attributes:
        ids: shape of their token ids.
        hidden: rows of hidden and latent states.
        run: rows that passes may take, of which each has an exit logit.
        sequences: rows that have a length of their own.
    """

    ids: tuple[int, int]
    hidden: int
    run: int
    sequences: int

    def bytes(self, shape: ModelShape, itemsize: int) -> int:
        """Of all of them, for floats of ``itemsize`` bytes."""
        width = (1 + (shape.layers if shape.has_latent else 0)) * shape.hidden_size
        floats = self.hidden * width + self.run * shape.has_exit_gate
        return floats * itemsize + 8 * math.prod(self.ids) + 4 * (self.sequences + 1)


def checked_loops(shape: ModelShape, loops: int) -> int:
    """A depth that the model has.

    Raises:
        ValueError: no whole number from 1 to ``MAX_LOOPS``, or more than one of a model of one loop: its layers do not
            read what they wrote.
    """
    if shape.trained_loops == 1 and whole_number("loops", loops, 1, MAX_LOOPS) > 1:
        raise ValueError(f"loops must be 1, got {loops}: this model has one loop")
    return whole_number("loops", loops, 1, MAX_LOOPS)


@dataclass(frozen=True)
class StatePlan:
    """Sizes of a state, known before it is allocated.

    Attributes:
        shape: the model.
        dtype: activation type.
        batch: sequences B.
        capacity: tokens S that the cache holds for each sequence.
        chunk: most tokens C processed in parallel in prefill.
        loops: cache sets of a LoopLM; a MELT state is the same for every value.
        kv_cache: how keys and values are stored.
    """

    shape: ModelShape
    dtype: str
    batch: int
    capacity: int
    chunk: int
    loops: int
    kv_cache: KVCacheKind = "float"

    def __post_init__(self) -> None:
        """Checks the sizes.

        Raises:
            ValueError: a size that is no whole number, below 1 or above its bound (the model's positions for a
                capacity, the capacity for a chunk), or an unknown kind of KV cache.
        """
        one_of("kv_cache", self.kv_cache, KV_CACHES)
        positions = self.shape.max_positions
        capacity = whole_number("capacity", self.capacity, 1, positions, " (max_positions)")
        sizes = {
            "capacity": capacity,
            "batch": whole_number("batch", self.batch, 1, MAX_BATCH),
            "chunk": whole_number("chunk", self.chunk, 1, capacity, " (the capacity)"),
            "loops": checked_loops(self.shape, self.loops),
        }
        for name, size in sizes.items():
            object.__setattr__(self, name, size)

    @property
    def cache_sets(self) -> int:
        """KV caches per layer: 1, or one for each loop."""
        return self.loops if self.shape.cache_kind == "per_loop" else 1

    def cache_set(self, loop_idx: int) -> int:
        """Which of the cache sets loop ``loop_idx`` reads and writes."""
        return loop_idx if self.shape.cache_kind == "per_loop" else 0

    def as_per_loop(self, loops: int | None = None) -> "StatePlan":
        """The plan of the same model with a KV cache for each of ``loops`` loops, as a LoopLM has."""
        return replace(
            self, shape=replace(self.shape, cache_kind="per_loop"), loops=self.loops if loops is None else loops
        )

    def require_loops(self, loops: int) -> None:
        """Refuses a depth that this state has no caches for. MELT's one cache serves every depth.

        Raises:
            ValueError: no whole number from 1 to ``MAX_LOOPS``, more than one of a model of one loop, or for a LoopLM
                more than it has caches.
        """
        checked_loops(self.shape, loops)
        if self.shape.cache_kind == "per_loop" and loops > self.cache_sets:
            raise ValueError(
                f"loops must be at most {self.cache_sets}, got {loops}: a LoopLM has one KV cache per loop; "
                f"load with loops={loops}"
            )

    @property
    def cells(self) -> int:
        """Cache sets of all sequences: a LoopLM has one for each loop of each."""
        return self.cache_sets * self.batch

    @property
    def step_rows(self) -> RowCounts:
        """Single tokens: one of each sequence, of a LoopLM one at each loop, and where the last loop leaves it."""
        hidden = self.cells + (self.batch if self.shape.cache_kind == "per_loop" else 0)
        return RowCounts((self.batch, 1), hidden, self.cells, self.cells)

    @property
    def chunk_rows(self) -> RowCounts:
        """A chunk of one sequence's prompt."""
        return RowCounts((1, self.chunk), self.chunk, self.chunk, 1)

    @property
    def wave_rows(self) -> RowCounts | None:
        """Consecutive tokens of each sequence over MELT's one cache, with room to move on before they are moved back.

        None where several cannot share a pass: the gate is told one loop for all, or each loop has its own cache, where
        they are single tokens.
        """
        if self.shape.cache_kind == "per_loop" or self.shape.has_loop_idx:
            return None
        rows = 2 * MOST_IN_FLIGHT * self.batch
        return RowCounts((1, rows), rows, rows, 1)

    def require_total(self, tokens: int) -> None:
        """Refuses a sequence that would not fit even in an empty cache.

        Raises:
            CapacityError: more than ``capacity`` tokens.
        """
        if tokens > self.capacity:
            raise CapacityError(
                f"prompt and new tokens need {tokens} rows, the capacity is {self.capacity}: load with "
                f"capacity={tokens} or more, shorten the prompt, or lower max_new_tokens"
            )

    @property
    def most_in_flight(self) -> int:
        """Consecutive tokens of one sequence that may be under way."""
        return self.cache_sets if self.shape.cache_kind == "per_loop" else MOST_IN_FLIGHT

    @property
    def logit_rows(self) -> int:
        """Rows of logits: of every single token that may be under way, or of the tokens of a wave."""
        return max(self.cells, MOST_IN_FLIGHT if self.wave_rows else 1)

    @property
    def cache_shape(self) -> tuple[int, int, int, int]:
        """Shape of one key or value buffer, [B, Hk, S, dh], or [B, Hk, S, dh / 2] at 4 bits."""
        width = cache_tensor(self.shape, self.dtype, self.kv_cache)[1]
        return self.batch, self.shape.kv_heads, self.capacity, width

    @property
    def cache_dtype(self) -> str:
        """Type of the elements of keys and values."""
        return cache_tensor(self.shape, self.dtype, self.kv_cache)[0]

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys and values."""
        elements = 2 * self.cache_sets * self.shape.layers * math.prod(self.cache_shape)
        return elements * stored_type(self.cache_dtype).itemsize

    @property
    def work_bytes(self) -> int:
        """Bytes of everything else that a step touches."""
        kinds = (self.step_rows, self.chunk_rows, *([self.wave_rows] if self.wave_rows else []))
        rows = sum(kind.bytes(self.shape, stored_type(self.dtype).itemsize) for kind in kinds)
        logits = 4 * self.logit_rows * self.shape.vocab_size
        loop_idx = 8 if self.shape.has_loop_idx else 0
        prompt_end = self.shape.hidden_size * stored_type(self.dtype).itemsize
        bookkeeping = self.batch * (8 + 2 * self.capacity + prompt_end)
        return rows + logits + loop_idx + bookkeeping

    @property
    def total_bytes(self) -> int:
        """Bytes of the whole state."""
        return self.cache_bytes + self.work_bytes

    @property
    def activation_bytes(self) -> int:
        """Intermediate results while a whole chunk is processed, about: 6 rows of the MLP and 12 hidden states a token.

        Measured in float32 on a CPU, not derived: ONNX Runtime decides what it holds at once, and its arena keeps it.
        """
        return max(self.batch, self.chunk) * 4 * (6 * self.shape.intermediate_size + 12 * self.shape.hidden_size)


def plan_state(
    manifest: Manifest,
    capacity: int | None = None,
    batch: int = 1,
    chunk: int | None = None,
    loops: int | None = None,
    kv_cache: KVCacheKind = "float",
) -> StatePlan:
    """Sizes of a state for a bundle, without allocating it.

    Raises:
        ValueError: a size outside its rule, or a kind of KV cache that the bundle has no loop for.
    """
    shape = instance("manifest", manifest, Manifest, "a Manifest").model
    one_of("kv_cache", kv_cache, manifest.kv_caches, f", which this {manifest.precision} bundle has")
    most = shape.max_positions
    capacity = (
        min(DEFAULT_CAPACITY, most)
        if capacity is None
        else whole_number("capacity", capacity, 1, most, " (max_positions)")
    )
    return StatePlan(
        shape=shape,
        dtype=manifest.activations,
        batch=batch,
        capacity=capacity,
        # A prompt longer than the capacity does not fit, so neither does a chunk.
        chunk=min(shape.trained_chunk, capacity) if chunk is None else chunk,
        loops=shape.trained_loops if loops is None else loops,
        kv_cache=kv_cache,
    )
