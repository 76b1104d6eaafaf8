"""Which sequence owns which rows of the cache, and what each row holds: tokens, their division into chunks, depths.

Which of them a prompt may keep, ``reuse.py`` says. Knows no text.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from melt_runtime.arguments import shown, whole_number
from melt_runtime.bundle.contract import MAX_LOOPS
from melt_runtime.errors import CapacityError
from melt_runtime.execute.reuse import count_reusable, count_shared
from melt_runtime.execute.snapshot import Snapshot
from melt_runtime.memory.buffers import State
from melt_runtime.memory.plan import Array, StatePlan, stored_type
from melt_runtime.schedule.depth import Depth
from melt_runtime.schedule.span import Span


class Slot:
    """One sequence and its rows of the cache.

    The last token of an answer was chosen but not run. Of those that were, the cache holds all but the last few, where
    a turn that failed wrote over them; these are run again, in the same chunks, before the sequence goes on.

    Attributes:
        number: which of the slots, counted from 0.
        ids: every token, of prompts and answers; replaced, never changed, when a turn begins.
        turn: counts what began or was undone, so that a stream knows whether the sequence is still the one it was made
            for.
        flight: what is to be run next, or is under way, oldest first: a chunk, or single tokens that follow each other.
        depths: where a chunk began, the loops that it went through, else 0; negative where running it plainly would
            give other rows: a LoopLM's chunk left early and its later caches were filled with copies, or MELT's token
            was one of a wave of a short lag; [S] int16, read-only.
        prompt_end: hidden state [D] of the last prompt's last token after its last loop, in the activations' type.
    """

    def __init__(self, number: int, plan: StatePlan):
        self.number = number
        self._plan = plan
        self._length = 0
        self._depths: Array = np.zeros(plan.capacity, dtype=np.int16)
        self._lost: Array = np.zeros(0, dtype=np.int16)
        self._caches = 0
        self._end = (0, 0)  # tokens and loops of the prompt whose end is kept; no tokens: none is
        self.prompt_end: Array = np.zeros(plan.shape.hidden_size, dtype=stored_type(plan.dtype))
        self.depths = self._depths.view()
        self.depths.setflags(write=False)
        self.ids: list[int] = []
        self.turn = 0
        self.flight: list[Span] = []

    @property
    def length(self) -> int:
        """Tokens whose final keys and values are in the cache."""
        return self._length

    @property
    def ran(self) -> int:
        """Tokens that were run, those that the cache has lost included."""
        return self._length + len(self._lost)

    @property
    def depth(self) -> int | None:
        """Caches that hold the tokens of a LoopLM, one for each loop; None while there are none, and for MELT."""
        return self._caches if self.ran and self._plan.shape.cache_kind == "per_loop" else None

    @property
    def room(self) -> int:
        """Tokens that can still be taken."""
        return self._plan.capacity - self._length

    def spare_row(self, cache_set: int, running: Sequence[Span]) -> int | None:
        """A row of a cache that holds nothing, where a pass over its neighbours may write; None: it must not.

        Args:
            cache_set: which of a LoopLM's caches; 0 for MELT's one.
            running: the spans of the pass.
        """
        for span in self.flight:
            if span.is_done:
                continue
            if span.loop <= cache_set:
                return span.start  # whose own pass writes there later
            if not (span.is_chunk or span.is_wave or span in running):
                return None  # its hidden state is among the neighbours'
        row = self._length + sum(len(span.ids) for span in self.flight)
        return row if row < self._plan.capacity else None

    def require_room(self, tokens: int) -> None:
        """Refuses what does not fit, before anything is written.

        Raises:
            CapacityError: fewer than ``tokens`` rows are left.
        """
        if tokens > self.room:
            raise CapacityError(
                f"{tokens} more tokens do not fit: capacity {self._plan.capacity}, in use {self._length}; "
                f"load with capacity={self._length + tokens} or more"
            )

    def require_loops(self, loops: int, kept: int) -> None:
        """Refuses a depth that cannot be run after ``kept`` tokens. MELT takes any, at any token.

        Raises:
            ValueError: no whole number from 1 to ``MAX_LOOPS``; for a LoopLM, more than it has caches, or another than
                its cached tokens had.
        """
        self._plan.require_loops(loops)
        if self._plan.shape.cache_kind == "per_loop" and kept and self.depth != loops:
            raise ValueError(
                f"loops must stay {self.depth} until reset, got {loops}: the tokens in a LoopLM's caches went through "
                f"{self.depth} loops"
            )

    def next_span(self, depth: Depth) -> Span:
        """What is to be run next of the tokens that the cache does not hold: a chunk, or the last token alone.

        Args:
            depth: of what was never run; what was lost takes its own again.
        """
        start = self._length
        if len(self._lost):
            later = np.flatnonzero(self._lost[1:])
            size = int(later[0]) + 1 if later.size else len(self._lost)
            loops = abs(int(self._lost[0]))
            return Span(self.number, start, self.ids[start : start + size], loops, caches=self._caches)
        left = len(self.ids) - start
        # A prompt's last token gives the answer's first: where a rule decides, it leaves on its own.
        size = min(self._plan.chunk, left - 1 if depth.rule and left > 1 else left)
        ids = self.ids[start : start + size]
        return Span(self.number, start, ids, depth.most, exit=depth.exit() if size == left else None)

    def commit(self) -> None:
        """Counts the oldest that is under way as final."""
        span, *self.flight = self.flight
        assert span.is_done
        left_early = self._plan.shape.cache_kind == "per_loop" and span.caches > span.depth
        self._count(len(span.ids), -span.depth if left_early or not span.is_plain else span.depth, span.caches)
        self._lost = self._lost[len(span.ids) :]

    def advance(self, tokens: int, loops: int) -> None:
        """Counts ``tokens``, one chunk that went through ``loops`` loops, as final.

        Raises:
            ValueError: an argument outside its rule.
            CapacityError: the tokens do not fit.
        """
        loops = whole_number("loops", loops, 1, MAX_LOOPS)
        tokens = whole_number("tokens", tokens, 1, self._plan.shape.max_positions)
        self.require_room(tokens)
        self._count(tokens, loops, loops)

    def _count(self, tokens: int, mark: int, caches: int) -> None:
        self._depths[self._length], self._caches = mark, caches
        self._length += tokens  # last, so that an interrupt leaves the chunk uncounted

    def continues(self, prompt: Sequence[int]) -> bool:
        """Whether ``prompt`` begins with the whole sequence and brings a token that was not run yet."""
        return len(prompt) > self.ran and list(prompt[: len(self.ids)]) == self.ids

    def shared(self, prompt: Sequence[int]) -> int:
        """Number of cached tokens that ``prompt`` begins with."""
        return count_shared(self.ids[: self._length], prompt)

    def reusable(self, prompt: Sequence[int], depth: Depth) -> int:
        """Number of cached tokens that ``prompt`` may keep, up to all of it: running it gives the same rows."""
        has_end = self._end == (len(prompt), depth.most)
        return count_reusable(self._plan, self._depths, self.shared(prompt), len(prompt), depth, has_end)

    def snapshot(self) -> Snapshot:
        """The sequence as it is."""
        return Snapshot(self.ids, np.concatenate((self._depths[: self._length], self._lost)), self._caches)

    def begin(self, prompt: Sequence[int], kept: int | None, loops: int) -> None:
        """Makes ``prompt`` the sequence.

        Args:
            prompt: token ids.
            kept: cached tokens that stay; None: the prompt continues the sequence, and all of them do.
            loops: depth of what is run next; with ``kept``, kept tokens of a LoopLM count as no deeper.
        """
        self.turn += 1
        if kept is not None:
            self.truncate(kept)
            self._lost, self._caches = self._lost[:0], loops
        self.ids = list(prompt)

    def keep_end(self, hidden: Array, loops: int) -> None:
        """Keeps the hidden state of the last cached token, where a prompt ends, so that the prompt can be reused whole.

        Args:
            hidden: after its last loop, [D].
            loops: depth of the prompt.
        """
        self.prompt_end[:] = hidden
        self._end = (self._length, loops)

    def undo(self, before: Snapshot, kept: int) -> None:
        """Makes the sequence what it was; of rows that were overwritten those of a short wave come back as plain ones.

        Args:
            before: taken before the turn began.
            kept: cached tokens that the turn left alone.
        """
        self.turn += 1
        kept = min(kept, self._length)
        if kept < len(before.depths):  # a chunk of which only the beginning was kept is run again as a whole
            kept = int(np.flatnonzero(before.depths[: kept + 1])[-1])
        self.truncate(kept)
        self.ids = before.ids
        self._lost, self._caches = before.depths[self._length :], before.caches

    def leave(self, tokens: int) -> None:
        """Ends a turn early, after its first ``tokens`` tokens; the last of them counts as chosen but not run."""
        self.truncate(min(self._length, tokens - 1))
        del self.ids[tokens:]

    def truncate(self, tokens: int) -> None:
        """Forgets all but the first ``tokens`` cached tokens; rows beyond are never read, so nothing is cleared.

        Raises:
            ValueError: no whole number from 0 to the cached length.
        """
        tokens = whole_number("tokens", tokens, 0, self._length, " (the sequence's length)")
        self.flight = []
        self._length = tokens
        self._depths[tokens:] = 0
        if tokens < self._end[0]:
            self._end = (0, 0)

    def forget(self) -> None:
        """Makes the sequence empty; the memory stays allocated."""
        self.turn += 1
        self.truncate(0)
        self.ids = []
        self._lost = self._lost[:0]

    def take(self, snapshot: Snapshot, length: int) -> None:
        """Makes the sequence what another was, of which this slot now has the first ``length`` rows."""
        self.forget()
        self.ids = snapshot.ids
        self._depths[:length], self._lost = snapshot.depths[:length], snapshot.depths[length:]
        self._length, self._caches = length, snapshot.caches

    def take_beginning(self, source: "Slot", tokens: int) -> None:
        """Makes the sequence the first ``tokens`` cached tokens of another, whose rows this slot has now."""
        snapshot, end = source.snapshot(), source._end
        self.take(replace(snapshot, ids=snapshot.ids[:tokens], depths=snapshot.depths[:tokens]), tokens)
        if 0 < end[0] <= tokens:
            self.prompt_end[:], self._end = source.prompt_end, end


class Slots:
    """The slots of a state: each has an owner, or is free."""

    def __init__(self, state: State):
        self._state = state
        self._slots = [Slot(number, state.plan) for number in range(state.plan.batch)]
        self._free = [True] * state.plan.batch
        self._released: list[int] = []  # numbers of those that were used, the one released longest ago first

    def __len__(self) -> int:
        """How many there are."""
        return len(self._slots)

    def __iter__(self) -> Iterator[Slot]:
        """All of them, from the first on."""
        return iter(self._slots)

    def __getitem__(self, number: int) -> Slot:
        """The slot of a number.

        Raises:
            ValueError: there is none.
        """
        return self._slots[whole_number("sequence", number, 0, len(self._slots) - 1, f" (batch {len(self._slots)})")]

    @property
    def lengths(self) -> list[int]:
        """Cached tokens of each."""
        return [slot.length for slot in self._slots]

    @property
    def nbytes(self) -> int:
        """Bytes of what is known of them, on the host."""
        return sum(8 + slot.depths.nbytes + slot.prompt_end.nbytes for slot in self._slots)

    @property
    def free(self) -> int:
        """How many have no owner."""
        return sum(self._free)

    def is_free(self, slot: Slot) -> bool:
        """Whether a slot has no owner; ``ValueError`` for what is no slot of this state."""
        return self._free[self._own(slot).number]

    def acquire(self) -> Slot:
        """The lowest free slot, which keeps passes short; what it holds may be kept as ``Slot.reusable`` says.

        Raises:
            CapacityError: every slot has an owner.
        """
        if not any(self._free):
            raise CapacityError(f"all {len(self)} slots are taken: load with slots={len(self) + 1} or more")
        return self._take(self._free.index(True))

    def acquire_for(self, prompt: Sequence[int], depth: Depth) -> Slot:
        """The free slot whose sequence a prompt goes on with; else one never used, or the one released longest ago.

        Prompts of different conversations begin alike, with the template or a system message. So on the CPU, where
        ``begin`` copies from any slot, a prompt takes a slot over only where it shares half of its tokens.

        Raises:
            CapacityError: every slot has an owner.
        """
        if not any(self._free):
            return self.acquire()
        free = [slot for slot in self._slots if self._free[slot.number]]
        age = {number: place for place, number in enumerate(self._released, start=1)}

        def kept(slot: Slot) -> int:
            if self._state.device != "cpu":
                return slot.reusable(prompt, depth)
            shared = slot.shared(prompt)
            return shared if 2 * shared >= slot.length else 0

        best = min(free, key=lambda slot: (-kept(slot), age.get(slot.number, 0), slot.number))
        return self._take(best.number)

    def _own(self, slot: Slot) -> Slot:
        if not any(slot is own for own in self._slots):
            raise ValueError(f"a slot must be one of this state's {len(self._slots)}, got {shown(slot)}")
        return slot

    def _take(self, number: int) -> Slot:
        self._free[number] = False
        self._released = [other for other in self._released if other != number]
        return self._slots[number]

    def release(self, slot: Slot) -> None:
        """Ends the ownership of ``slot``: what was in flight is dropped, what its cache holds stays until it is used
        again. ``ValueError`` for what is no slot of this state."""
        self._own(slot).truncate(slot.length)
        if not self._free[slot.number]:
            self._released.append(slot.number)
        self._free[slot.number] = True

    def release_all(self) -> None:
        """Ends every ownership, however the owners were left."""
        for slot in self._slots:
            self.release(slot)

    def fork(self, source: Slot, tokens: int | None = None) -> Slot:
        """A slot with the first cached tokens of another, copied.

        Args:
            source: stays as it is.
            tokens: how many, ending where a chunk does; default: all that are cached.

        Raises:
            CapacityError: every slot has an owner.
            ValueError: ``source`` is no slot of this state; ``tokens`` outside its rule, or in the middle of a chunk.
        """
        self._own(source)
        tokens = source.length if tokens is None else tokens
        whole_number("tokens", tokens, 0, source.length, " (the sequence's length)")
        if 0 < tokens < source.length and not source.depths[tokens]:
            raise ValueError(f"tokens must end where a chunk does, got {tokens}")
        slot = self.acquire()
        self.copy(source, slot, tokens)
        return slot

    def begin(self, slot: Slot, prompt: Sequence[int], depth: Depth) -> None:
        """Makes ``prompt`` the sequence of ``slot``, with the longest beginning that any slot may give it."""
        others = self._slots if self._state.device == "cpu" else []  # elsewhere a copy goes through the host
        sources = [slot, *(other for other in others if other is not slot)]  # of equal ones the first: without a copy
        tokens, source = max(((other.reusable(prompt, depth), other) for other in sources), key=lambda pair: pair[0])
        self.copy(source, slot, tokens)
        slot.begin(prompt, tokens, depth.most)

    def copy(self, source: Slot, target: Slot, tokens: int) -> None:
        """Makes ``target`` a sequence of the first ``tokens`` cached tokens of ``source``."""
        if source is not target:
            for layers in self._state.caches:
                for pair in layers:
                    for buffer in pair:
                        with buffer.on_host() as values:
                            values[target.number, :, :tokens] = values[source.number, :, :tokens]
        target.take_beginning(source, tokens)
