"""A driver for applications that handle token ids and logits themselves: prompts and tokens in, logits out."""

from collections.abc import Callable, Sequence

from melt_runtime.arguments import function_or_none, whole_number
from melt_runtime.execute.bindings import Sessions
from melt_runtime.execute.device_sampler import DeviceSampler
from melt_runtime.execute.executor import Executor, Flight
from melt_runtime.execute.slots import Slot, Slots
from melt_runtime.hold import Hold
from melt_runtime.memory.buffers import State
from melt_runtime.memory.plan import Array
from melt_runtime.progress import Progress
from melt_runtime.request.ids import check_ids
from melt_runtime.schedule.span import Span

Observer = Callable[[int], None]
"""Called after every loop with its index, while ``LoopRunner.flight`` is what that loop left; for verification."""


class LoopRunner:
    """Drives the graphs over one state, one call at a time: another, from any thread, is refused with ``BusyError``.

    Attributes:
        sessions: the graphs.
        state: the buffers.
        slots: what each sequence holds; its number is that of its slot.
        sampler: chooses tokens on the device; None on the CPU, and for several sequences.
    """

    def __init__(self, sessions: Sessions, state: State):
        self.sessions, self.state = sessions, state
        self._executor = Executor(sessions, state)
        self._hold = Hold("this runner is at work in another thread: make one for each with model.new_runner()")
        self._span: Span | None = None

    @property
    def slots(self) -> Slots:
        """What each sequence holds."""
        return self._executor.slots

    @property
    def sampler(self) -> DeviceSampler | None:
        """Chooses tokens on the device; None on the CPU, and for several sequences."""
        return self._executor.sampler

    @property
    def state_bytes(self) -> int:
        """Bytes of the whole state."""
        return self.state.nbytes + self.slots.nbytes

    @property
    def flight(self) -> Flight:
        """What the buffers hold of the tokens that ran last, of several sequences the first's.

        Raises:
            ValueError: nothing ran.
        """
        if self._span is None:
            raise ValueError("flight is what a call of prefill or decode leaves: nothing ran yet")
        return Flight(self._span, self.state)

    def reset(self) -> None:
        """Forgets all tokens of all sequences.

        Raises:
            BusyError: a call is at work.
        """
        with self._hold.taken():
            for slot in self.slots:
                slot.forget()

    def prefill(
        self,
        ids: Sequence[int],
        loops: int,
        chunk: int | None = None,
        sequence: int = 0,
        observe: Observer | None = None,
        progress: Progress | None = None,
    ) -> Array:
        """Appends ``ids`` to one sequence, chunk after chunk.

        Args:
            ids: token ids, at least one.
            loops: depth T.
            chunk: tokens in parallel C; default: what the state was made for. Another value gives other numbers.
            sequence: row of the batch.
            observe: called after every loop.
            progress: called after every chunk.

        Returns:
            Logits of the last token, [V] float32, a view that the next step overwrites.

        Raises:
            TokenError: no ids, or ids outside the vocabulary.
            ValueError: ``loops``, ``chunk`` or ``sequence`` outside its rule.
            CapacityError: the ids do not fit.
            BusyError: another call is at work. Nothing was computed or changed by any of these.
        """
        with self._hold.taken():
            span = self._prefill(ids, loops, chunk, sequence, observe, progress)
            return self._executor.compute_logits([span])[0]

    def prefill_and_draw(self, ids: Sequence[int], loops: int, progress: Progress | None = None) -> int:
        """As ``prefill``, and draws the next token on the device with the sampler's settings.

        Raises:
            NumericalError: the logits hold NaN or infinity.
            TokenError, ValueError, CapacityError, BusyError: as for ``prefill``, or there is no sampler.
        """
        with self._hold.taken():
            self._require_sampler()
            return self._executor.draw(self._prefill(ids, loops, None, 0, None, progress))

    def decode(self, ids: Sequence[int], loops: int, observe: Observer | None = None) -> Array:
        """Appends one token to every sequence of the batch; they may have different lengths.

        Args:
            ids: one token id a sequence.
            loops: depth T.
            observe: called after every loop.

        Returns:
            Logits, [B, V] float32, a view that the next step overwrites.

        Raises:
            TokenError, ValueError, CapacityError, BusyError: as for ``prefill``.
        """
        with self._hold.taken():
            self._executor.compute_logits(self._decode(ids, loops, observe))
            return self.state.logits.values()[: len(self.slots)]

    def decode_and_draw(self, token: int, loops: int) -> int:
        """As ``decode`` for one sequence, and draws the next token on the device with the sampler's settings.

        A token that the device drew is there already and is not sent again.

        Raises:
            NumericalError: the logits hold NaN or infinity.
            TokenError, ValueError, CapacityError, BusyError: as for ``prefill``, or there is no sampler.
        """
        with self._hold.taken():
            self._require_sampler()
            return self._executor.draw(self._decode([token], loops, None)[0])

    def _prefill(
        self,
        ids: Sequence[int],
        loops: int,
        chunk: int | None,
        sequence: int,
        observe: Observer | None,
        progress: Progress | None,
    ) -> Span:
        """Everything up to the head; returns the last chunk."""
        plan = self.state.plan
        function_or_none("observe", observe)
        function_or_none("progress", progress)
        chunk = plan.chunk if chunk is None else whole_number("chunk", chunk, 1, plan.chunk, " (the state's chunk)")
        slot = self.slots[sequence]
        tokens = check_ids(ids, plan.shape, slot.require_room)
        slot.require_loops(loops, slot.length)
        for start in range(0, len(tokens), chunk):
            span = self._append(slot, tokens[start : start + chunk], loops)
            self._run([span], observe)
            if progress is not None:
                progress(start + len(span.ids), len(tokens))
        return span

    def _decode(self, ids: Sequence[int], loops: int, observe: Observer | None) -> list[Span]:
        """Everything up to the head."""
        function_or_none("observe", observe)
        tokens = check_ids(ids, self.state.plan.shape, self._require_one_each)
        for slot in self.slots:
            slot.require_loops(loops, slot.length)
            slot.require_room(1)
        spans = [self._append(slot, [token], loops) for slot, token in zip(self.slots, tokens, strict=True)]
        self._run(spans, observe)
        return spans

    def _require_one_each(self, tokens: int) -> None:
        if tokens != len(self.slots):
            raise ValueError(f"ids must hold one token for each of {len(self.slots)} sequences, got {tokens}")

    def _append(self, slot: Slot, tokens: list[int], loops: int) -> Span:
        del slot.ids[slot.length :]
        slot.ids += tokens
        slot.flight = [Span(slot.number, slot.length, tokens, loops)]
        return slot.flight[0]

    def _run(self, spans: list[Span], observe: Observer | None) -> None:
        """All loops of a chunk, or of one token of every sequence."""
        self._span = spans[0]
        for loop_idx in range(spans[0].depth):
            self._executor.run(spans)
            if observe is not None:
                observe(loop_idx)
        for span in spans:
            self.slots[span.slot].commit()

    def _require_sampler(self) -> None:
        if self.sampler is None:
            raise ValueError("this runner cannot draw tokens on a device: it runs on the CPU, or several sequences")
