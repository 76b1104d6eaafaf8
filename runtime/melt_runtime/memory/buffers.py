"""Everything that a pass touches, allocated once: KV cache, latent state, hidden state, logits, ids.

Its size is a function of batch, capacity, chunk and types alone, never of the number of loops (MELT), or times the
loops that it was made for (LoopLM). Which rows hold what, it does not know. Letters: ``melt_runtime.bundle.contract``.
"""

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from melt_runtime.device.ort import ort
from melt_runtime.device.providers import DeviceKind
from melt_runtime.errors import CapacityError
from melt_runtime.memory.plan import Array, RowCounts, StatePlan, stored_type

BFLOAT16 = 16  # ONNX's number of the type


class Buffer:
    """A device tensor that stays where it is; slices of it are bound by address.

    Attributes:
        dtype: numpy's type of its elements; bfloat16 is held as uint16.
        element_type: what ONNX Runtime is told.
        device: where it lies.
        device_id: which of several.
        value: the memory, of which a part has only some.
        shape: its sizes.
    """

    _part: tuple[int, int] | None = None  # of a part: the first of its rows in the whole, and their number

    def __init__(self, shape: tuple[int, ...], dtype: str, device: DeviceKind, device_id: int = 0):
        self.dtype = stored_type(dtype)
        self.element_type: Any = BFLOAT16 if dtype == "bfloat16" else self.dtype.type
        self.device, self.device_id = device, device_id
        self.shape = shape
        try:
            self.value = ort.OrtValue.ortvalue_from_shape_and_type(shape, self.dtype.type, device, device_id)
        except Exception as error:  # ONNX Runtime has no common base class below Exception
            raise CapacityError(
                f"{self.nbytes} bytes for one buffer of the state cannot be allocated on {device}: lower capacity, "
                f"batch or chunk ({error})"
            ) from error

    def part(self, first: int, count: int) -> "Buffer":
        """Some of the rows of a whole buffer, in the same memory."""
        part = copy.copy(self)
        part.shape, part._part = (count, *self.shape[1:]), (first, count)
        return part

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return math.prod(self.shape) * self.dtype.itemsize

    def address(self, offset: int = 0) -> int:
        """Address of the element ``offset`` (counted in elements, row-major)."""
        before = math.prod(self.shape[1:]) * self._part[0] if self._part else 0
        return int(self.value.data_ptr()) + (before + offset) * self.dtype.itemsize

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
        """Copies ``values``, of the buffer's own shape and type, to the device; not of a part.

        Raises:
            ValueError: they have another shape or type.
        """
        if (values.shape, values.dtype) != (self.shape, self.dtype):
            wanted = f"{list(self.shape)} {self.dtype}"
            raise ValueError(f"values must be {wanted}, got {list(values.shape)} {values.dtype}")
        self.value.update_inplace(values)

    def values(self) -> Array:
        """All values: on the CPU the memory itself, of another device a copy."""
        values: Array = self.value.numpy()
        return values[self._part[0] :][: self._part[1]] if self._part else values

    @contextmanager
    def on_host(self) -> Iterator[Array]:
        """All values, to be changed in place; of another device a copy, which is written back at the end."""
        values = self.value.numpy()
        yield values[self._part[0] :][: self._part[1]] if self._part else values
        if self.device != "cpu":
            self.value.update_inplace(values)

    def read(self) -> Array:
        """Copy on the host; for verification and tests, never in a step."""
        return np.array(self.values())


class TokenRows:
    """Tokens in flight: single ones of each slot, a chunk of one, or the waves of each.

    Attributes:
        ids: [B, 1] or [1, rows] int64.
        hidden: [rows, D].
        latent: [N, rows, D], None where the gate has no latent state. A chunk that is shorter stands packed at its
            beginning, layer after layer.
        exit_logit: [rows], None where the model has no exit gate.
        last_row: [rows] or [1] int32, ``seqlens_k`` of the contract.
        total_length: [1] int32 on the host, ``total_sequence_length``.
    """

    def __init__(self, plan: StatePlan, rows: RowCounts, device: DeviceKind, device_id: int):
        model, dtype, place = plan.shape, plan.dtype, (device, device_id)
        self.ids = Buffer(rows.ids, "int64", *place)
        self.hidden = Buffer((rows.hidden, model.hidden_size), dtype, *place)
        latent_shape = (model.layers, rows.hidden, model.hidden_size)
        self.latent = Buffer(latent_shape, dtype, *place) if model.has_latent else None
        self.exit_logit = Buffer((rows.run,), dtype, *place) if model.has_exit_gate else None
        self.last_row = Buffer((rows.sequences,), "int32", *place)
        self.total_length = Buffer((1,), "int32", "cpu")

    @property
    def buffers(self) -> list[Buffer]:
        """All of them."""
        found = (self.ids, self.hidden, self.latent, self.exit_logit, self.last_row, self.total_length)
        return [buffer for buffer in found if buffer is not None]


class State:
    """The buffers of one or more sequences, each in a slot of its own.

    Attributes:
        plan: the sizes.
        device: where they lie.
        cells: ``cells[layer]`` is (keys, values) of all cache sets and slots, set after set, [sets * B, Hk, S, dh]: a
            batch of the graph may hold any of them that are neighbours.
        caches: ``caches[set][layer]``, the parts of these of one set, each of the plan's ``cache_shape``.
        step: single tokens of every slot; of a LoopLM one at each loop, loop after loop.
        chunk: a chunk of one slot.
        wave: consecutive tokens of every slot at loops of their own, over MELT's one cache; None where none can be.
        row_shift: rows by which a single token moves at each loop. On the CPU a LoopLM's tokens lie like the caches
            that they read, so that one pass takes tokens at any loops.
        logits: of tokens that were asked for, [rows, V] float32, on the host.
        loop_idx: which loop runs, [1] int64, only for gate kind ``mean``.
    """

    def __init__(self, plan: StatePlan, device: DeviceKind, device_id: int = 0):
        place = (device, device_id)
        self.plan = plan
        self.device = device
        whole = (plan.cells, *plan.cache_shape[1:])
        self.cells = [
            (Buffer(whole, plan.cache_dtype, *place), Buffer(whole, plan.cache_dtype, *place))
            for _ in range(plan.shape.layers)
        ]
        self.caches = [
            [(keys.part(first, plan.batch), values.part(first, plan.batch)) for keys, values in self.cells]
            for first in range(0, plan.cells, plan.batch)
        ]
        self.step = TokenRows(plan, plan.step_rows, *place)
        self.chunk = TokenRows(plan, plan.chunk_rows, *place)
        self.wave = TokenRows(plan, plan.wave_rows, *place) if plan.wave_rows else None
        self.row_shift = plan.batch if plan.shape.cache_kind == "per_loop" and device == "cpu" else 0
        self.logits = Buffer((plan.logit_rows, plan.shape.vocab_size), "float32", "cpu")
        self.loop_idx = Buffer((1,), "int64", *place) if plan.shape.has_loop_idx else None

    def step_row(self, slot: int, loop: int) -> int:
        """Where a slot's single token lies before its loop of that index; after the last one for its depth."""
        return slot + loop * self.row_shift

    if not TYPE_CHECKING:  # a checker shall find unknown names itself

        def __getattr__(self, name: str) -> NoReturn:
            """Names what serves in place of what a state knew before.

            Raises:
                AttributeError: always.
            """
            serves = f": it is {_MOVED[name]} now" if name in _MOVED else ""
            raise AttributeError(f"State has no {name}{serves}")

    @property
    def nbytes(self) -> int:
        """Bytes allocated, counted buffer by buffer."""
        buffers = [buffer for pair in self.cells for buffer in pair]
        buffers += [*self.step.buffers, *self.chunk.buffers, *(self.wave.buffers if self.wave else ()), self.logits]
        return sum(buffer.nbytes for buffer in buffers) + (self.loop_idx.nbytes if self.loop_idx is not None else 0)


_MOVED = {
    "lengths": "runner.slots.lengths",
    "depths": "runner.slots[sequence].depths",
    "depth": "runner.slots[sequence].depth",
    "room": "runner.slots[sequence].room",
    "advance": "runner.slots[sequence].advance(tokens, loops)",
    "truncate": "runner.slots[sequence].truncate(tokens)",
    "reset": "runner.reset()",
    "hidden": "runner.flight.hidden",
    "latent": "runner.flight.latents",
    "exit_logit": "runner.flight.exit_logits",
}
