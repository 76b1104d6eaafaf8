"""Everything that a step touches, allocated once: KV cache, latent state, hidden state, logits, ids, lengths.

Its size is a function of batch, capacity, chunk and types alone, never of the number of loops (MELT), or times the
loops that it was made for (LoopLM). Letters: ``melt_runtime.contract``.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from melt_runtime.contract import KV_CACHES, KVCacheKind, ModelShape, cache_tensor
from melt_runtime.errors import CapacityError
from melt_runtime.providers import DeviceKind

Array = NDArray[Any]

_STORED_AS = {"bfloat16": "uint16"}  # numpy has no such type; the bits are the same
_BFLOAT16 = 16  # ONNX's number of the type


def stored_type(dtype: str) -> np.dtype[Any]:
    """Numpy's type of a tensor's elements, or the one that has room for them."""
    return np.dtype(_STORED_AS.get(dtype, dtype))


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
            ValueError: a size below 1, a capacity beyond the model's positions, an unknown kind of KV cache.
        """
        if self.kv_cache not in KV_CACHES:
            raise ValueError(f"kv_cache must be one of {', '.join(KV_CACHES)}, got {self.kv_cache!r}")
        for name in ("batch", "capacity", "chunk", "loops"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.capacity > self.shape.max_positions:
            raise ValueError(
                f"capacity must be at most {self.shape.max_positions} (max_positions), got {self.capacity}"
            )

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

    @property
    def rows(self) -> int:
        """Tokens in flight at most: a prefill chunk of one sequence, or one token of each."""
        return max(self.batch, self.chunk)

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
        latents = self.shape.layers if self.shape.has_latent else 0
        floats = self.rows * ((1 + latents) * self.shape.hidden_size + self.shape.has_exit_gate)
        logits = 4 * self.batch * self.shape.vocab_size
        loop_idx = 8 if self.shape.has_loop_idx else 0
        ids = 8 * (self.batch + self.chunk)
        bookkeeping = self.batch * (8 + self.capacity)
        return floats * self._itemsize + logits + loop_idx + ids + 4 * (self.batch + 2) + bookkeeping

    @property
    def total_bytes(self) -> int:
        """Bytes of the whole state."""
        return self.cache_bytes + self.work_bytes

    @property
    def activation_bytes(self) -> int:
        """Intermediate results while a whole chunk is processed, about: 6 rows of the MLP and 12 hidden states a token.

        Measured in float32 on a CPU, not derived: ONNX Runtime decides what it holds at once, and its arena keeps it.
        """
        return self.rows * 4 * (6 * self.shape.intermediate_size + 12 * self.shape.hidden_size)

    @property
    def _itemsize(self) -> int:
        return stored_type(self.dtype).itemsize


class Buffer:
    """A device tensor that stays where it is; slices of it are bound by address.

    Attributes:
        dtype: numpy's type of its elements; bfloat16 is held as uint16.
        element_type: what ONNX Runtime is told.
        device: where it lies.
        device_id: which of several.
        value: the memory.
        shape: its sizes.
    """

    def __init__(self, shape: tuple[int, ...], dtype: str, device: DeviceKind, device_id: int = 0):
        self.dtype = stored_type(dtype)
        self.element_type: Any = _BFLOAT16 if dtype == "bfloat16" else self.dtype.type
        self.device, self.device_id = device, device_id
        self.value = ort.OrtValue.ortvalue_from_shape_and_type(shape, self.dtype.type, device, device_id)
        self.shape = shape

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return math.prod(self.shape) * self.dtype.itemsize

    def address(self, offset: int = 0) -> int:
        """Address of the element ``offset`` (counted in elements, row-major)."""
        return int(self.value.data_ptr()) + offset * self.dtype.itemsize

    def bind_input(
        self, binding: ort.IOBinding, name: str, shape: Sequence[int] | None = None, offset: int = 0
    ) -> None:
        """Binds ``shape`` (default: all of it) from the element ``offset`` on as an input."""
        binding.bind_input(name, *self._place(shape, offset))

    def bind_output(
        self, binding: ort.IOBinding, name: str, shape: Sequence[int] | None = None, offset: int = 0
    ) -> None:
        """As ``bind_input``, as an output."""
        binding.bind_output(name, *self._place(shape, offset))

    def _place(self, shape: Sequence[int] | None, offset: int) -> tuple[Any, ...]:
        sizes = list(self.shape if shape is None else shape)
        return self.device, self.device_id, self.element_type, sizes, self.address(offset)

    def write(self, values: Array) -> None:
        """Copies ``values``, of the buffer's own shape and type, to the device."""
        assert (values.shape, values.dtype) == (self.shape, self.dtype)
        self.value.update_inplace(values)

    def read(self) -> Array:
        """Copy on the host; for verification and tests, never in a step."""
        return np.array(self.value.numpy())


class State:
    """The buffers of one or more sequences, and how many tokens each holds.

    Attributes:
        plan: the sizes.
        caches: ``caches[set][layer]`` is (keys, values), each of the plan's ``cache_shape``.
        hidden: [rows, D].
        latent: [N, rows, D], None where the gate has no latent state.
        exit_logit: [rows], None where the model has no exit gate.
        logits: of each sequence's last token, [B, V] float32, on the host.
        loop_idx: which loop runs, [1] int64, only for gate kind ``mean``.
        lengths: tokens in the cache of each sequence, [B].
        starts: where a chunk of each sequence began, [B, S] bool, on the host.
        depth: loops that the cached tokens of a LoopLM went through, None while there are none.
    """

    def __init__(self, plan: StatePlan, device: DeviceKind, device_id: int = 0):
        shape, dtype = plan.shape, plan.dtype
        self.plan = plan
        self.device = device
        place = (device, device_id)
        self.caches = [
            [
                (Buffer(plan.cache_shape, plan.cache_dtype, *place), Buffer(plan.cache_shape, plan.cache_dtype, *place))
                for _ in range(shape.layers)
            ]
            for _ in range(plan.cache_sets)
        ]
        self.hidden = Buffer((plan.rows, shape.hidden_size), dtype, *place)
        latent_shape = (shape.layers, plan.rows, shape.hidden_size)
        self.latent = Buffer(latent_shape, dtype, *place) if shape.has_latent else None
        self.exit_logit = Buffer((plan.rows,), dtype, *place) if shape.has_exit_gate else None
        self.logits = Buffer((plan.batch, shape.vocab_size), "float32", "cpu")
        self.step_ids = Buffer((plan.batch, 1), "int64", *place)
        self.step_last_row = Buffer((plan.batch,), "int32", *place)
        self.chunk_ids = Buffer((1, plan.chunk), "int64", *place)
        self.chunk_last_row = Buffer((1,), "int32", *place)
        self.total_length = Buffer((1,), "int32", "cpu")
        self.loop_idx = Buffer((1,), "int64", *place) if shape.has_loop_idx else None
        self.depth: int | None = None
        self.lengths = np.zeros(plan.batch, dtype=np.int64)
        self.starts = np.zeros((plan.batch, plan.capacity), dtype=np.bool_)

    @property
    def nbytes(self) -> int:
        """Bytes allocated, counted buffer by buffer."""
        buffers = [buffer for cache in self.caches for pair in cache for buffer in pair]
        buffers += [self.hidden, self.logits, self.step_ids, self.step_last_row]
        buffers += [self.chunk_ids, self.chunk_last_row, self.total_length]
        buffers += [buffer for buffer in (self.latent, self.exit_logit, self.loop_idx) if buffer is not None]
        return sum(buffer.nbytes for buffer in buffers) + self.lengths.nbytes + self.starts.nbytes

    def room(self, sequence: int = 0) -> int:
        """Tokens that ``sequence`` can still take."""
        return self.plan.capacity - int(self.lengths[sequence])

    def require_room(self, tokens: int, sequence: int = 0) -> None:
        """Refuses what does not fit, before anything is written.

        Raises:
            CapacityError: fewer than ``tokens`` rows are left.
        """
        if tokens > self.room(sequence):
            raise CapacityError(
                f"{tokens} more tokens do not fit: capacity {self.plan.capacity}, in use "
                f"{int(self.lengths[sequence])}; load with capacity={int(self.lengths[sequence]) + tokens} or more"
            )

    def require_total(self, tokens: int) -> None:
        """Refuses a sequence that would not fit even in an empty cache.

        Raises:
            CapacityError: more than ``capacity`` tokens.
        """
        if tokens > self.plan.capacity:
            raise CapacityError(
                f"prompt and new tokens need {tokens} rows, the capacity is {self.plan.capacity}: load with "
                f"capacity={tokens} or more, shorten the prompt, or lower max_new_tokens"
            )

    def require_loops(self, loops: int, kept: int) -> None:
        """Refuses a depth that the state cannot run after ``kept`` cached tokens. MELT takes any, at any token.

        Raises:
            ValueError: below 1; for a LoopLM, more than it has caches, or another than its cached tokens had.
        """
        if loops < 1:
            raise ValueError(f"loops must be at least 1, got {loops}")
        if self.plan.shape.cache_kind == "shared":
            return
        if loops > self.plan.cache_sets:
            raise ValueError(
                f"loops must be at most {self.plan.cache_sets}, got {loops}: a LoopLM has one KV cache per loop; "
                f"load with loops={loops}"
            )
        if kept and self.depth != loops:
            raise ValueError(
                f"loops must stay {self.depth} until reset, got {loops}: the tokens in a LoopLM's caches went through "
                f"{self.depth} loops"
            )

    def advance(self, tokens: int, sequence: int, loops: int) -> None:
        """Counts ``tokens``, one chunk that went through ``loops`` loops, as final."""
        self.require_room(tokens, sequence)
        self.starts[sequence, self.lengths[sequence]] = True
        self.lengths[sequence] += tokens
        self.depth = loops

    def whole_chunks(self, tokens: int, sequence: int = 0) -> int:
        """Most cached tokens, up to ``tokens``, that end where a chunk ends.

        Kept whole, chunks divide a continued sequence as they would divide it from the start, so the numbers are equal.
        """
        if tokens == self.lengths[sequence]:
            return tokens
        return int(np.flatnonzero(self.starts[sequence, : tokens + 1])[-1])

    def truncate(self, tokens: int, sequence: int = 0) -> None:
        """Forgets all but the first ``tokens`` tokens; rows beyond are never read, so nothing is cleared."""
        assert 0 <= tokens <= self.lengths[sequence]
        self.lengths[sequence] = tokens
        self.starts[sequence, tokens:] = False
        if not self.lengths.any():
            self.depth = None

    def reset(self) -> None:
        """Forgets all tokens of all sequences."""
        for sequence in range(self.plan.batch):
            self.truncate(0, sequence)
