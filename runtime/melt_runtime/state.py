"""Everything that a step touches, allocated once: KV cache, latent state, hidden state, logits, ids, lengths.

Its size is a function of batch, capacity, chunk and types alone, never of the number of loops (MELT), or times the
loops that it was made for (LoopLM). Letters: ``melt_runtime.bundle.contract``.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from melt_runtime.arguments import whole_number
from melt_runtime.bundle.contract import MAX_LOOPS
from melt_runtime.device.providers import DeviceKind
from melt_runtime.errors import CapacityError
from melt_runtime.memory.plan import StatePlan, stored_type

Array = NDArray[Any]

_BFLOAT16 = 16  # ONNX's number of the type


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
        self.shape = shape
        try:
            self.value = ort.OrtValue.ortvalue_from_shape_and_type(shape, self.dtype.type, device, device_id)
        except Exception as error:  # ONNX Runtime has no common base class below Exception
            raise CapacityError(
                f"{self.nbytes} bytes for one buffer of the state cannot be allocated on {device}: lower capacity, "
                f"batch or chunk ({error})"
            ) from error

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
        if offset < 0 or offset + math.prod(sizes) > math.prod(self.shape):
            raise ValueError(f"{sizes} from element {offset} on must lie in a buffer of {list(self.shape)}")
        return self.device, self.device_id, self.element_type, sizes, self.address(offset)

    def write(self, values: Array) -> None:
        """Copies ``values``, of the buffer's own shape and type, to the device.

        Raises:
            ValueError: they have another shape or type.
        """
        if (values.shape, values.dtype) != (self.shape, self.dtype):
            wanted = f"{list(self.shape)} {self.dtype}"
            raise ValueError(f"values must be {wanted}, got {list(values.shape)} {values.dtype}")
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
        lengths: tokens in the cache of each sequence, [B] int64, read-only.
        depths: where a chunk of each sequence began, the loops that it went through, else 0; [B, S] int16 on the host,
            read-only.
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
        self._lengths = np.zeros(plan.batch, dtype=np.int64)
        self._depths = np.zeros((plan.batch, plan.capacity), dtype=np.int16)
        self.lengths, self.depths = self._lengths.view(), self._depths.view()
        for view in (self.lengths, self.depths):
            view.setflags(write=False)

    @property
    def nbytes(self) -> int:
        """Bytes allocated, counted buffer by buffer."""
        buffers = [buffer for cache in self.caches for pair in cache for buffer in pair]
        buffers += [self.hidden, self.logits, self.step_ids, self.step_last_row]
        buffers += [self.chunk_ids, self.chunk_last_row, self.total_length]
        buffers += [buffer for buffer in (self.latent, self.exit_logit, self.loop_idx) if buffer is not None]
        return sum(buffer.nbytes for buffer in buffers) + self.lengths.nbytes + self.depths.nbytes

    @property
    def depth(self) -> int | None:
        """Loops that the cached tokens of a LoopLM went through; None while there are none."""
        return int(self.depths[:, 0].max()) or None

    def room(self, sequence: int = 0) -> int:
        """Tokens that ``sequence`` can still take.

        Raises:
            ValueError: no row of the batch.
        """
        return self.plan.capacity - int(self.lengths[self.require_sequence(sequence)])

    def require_sequence(self, sequence: int) -> int:
        """``sequence``, where it is a row of the batch.

        Raises:
            ValueError: it is none.
        """
        return whole_number("sequence", sequence, 0, self.plan.batch - 1, f" (batch {self.plan.batch})")

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
            ValueError: no whole number from 1 to ``MAX_LOOPS``; for a LoopLM, more than it has caches, or another than
                its cached tokens had.
        """
        whole_number("loops", loops, 1, MAX_LOOPS)
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
        """Counts ``tokens``, one chunk that went through ``loops`` loops, as final.

        Raises:
            ValueError: an argument outside its rule.
            CapacityError: the tokens do not fit.
        """
        sequence, loops = self.require_sequence(sequence), whole_number("loops", loops, 1, MAX_LOOPS)
        tokens = whole_number("tokens", tokens, 1, self.plan.shape.max_positions)
        self.require_room(tokens, sequence)
        self._depths[sequence, self._lengths[sequence]] = loops
        self._lengths[sequence] += tokens  # last, so that an interrupt leaves the chunk uncounted

    def full_chunks(self, tokens: int, loops: int, sequence: int = 0) -> int:
        """Most cached tokens, up to ``tokens``, that a prompt run from the start through ``loops`` loops makes again.

        They stand in full chunks from the start on, each of this depth, so that keeping them changes no number.
        """
        chunk, depths, length = self.plan.chunk, self.depths[sequence], int(self.lengths[sequence])
        kept = 0
        while (end := kept + chunk) <= min(tokens, length):
            ends_whole = end == length or depths[end] != 0
            if depths[kept] != loops or depths[kept + 1 : end].any() or not ends_whole:
                break
            kept = end
        return kept

    def truncate(self, tokens: int, sequence: int = 0) -> None:
        """Forgets all but the first ``tokens`` tokens; rows beyond are never read, so nothing is cleared.

        Raises:
            ValueError: no whole number from 0 to the sequence's length, or no row of the batch.
        """
        length = int(self._lengths[self.require_sequence(sequence)])
        tokens = whole_number("tokens", tokens, 0, length, " (the sequence's length)")
        self._lengths[sequence] = tokens
        self._depths[sequence, tokens:] = 0

    def reset(self) -> None:
        """Forgets all tokens of all sequences."""
        for sequence in range(self.plan.batch):
            self.truncate(0, sequence)
