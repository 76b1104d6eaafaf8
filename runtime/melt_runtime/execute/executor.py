"""Runs passes of the loop graph: the only writer of the cache. Knows slots and token ids, nothing of text, or of why.

A pass is one loop, over a chunk of one sequence, over single tokens of several, which may be at different loops, or
over a wave: consecutive tokens of one sequence, each at a loop of its own. A LoopLM's wave is made of single tokens,
since each of its loops has a cache. What goes in are token ids and positions; what comes out are logits where they are
asked for, or on a device the token that was drawn from them there.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from melt_runtime.execute.bindings import Bindings, Sessions
from melt_runtime.execute.device_sampler import DeviceSampler
from melt_runtime.execute.slots import Slots
from melt_runtime.memory.buffers import BFLOAT16, State, TokenRows
from melt_runtime.memory.plan import MOST_IN_FLIGHT, Array
from melt_runtime.schedule.span import Span

_BRIDGED = 2
"""Rows that are computed for nothing between two others, at most, rather than run the graph twice."""


@dataclass(frozen=True)
class Flight:
    """What lies in the buffers for some tokens between two passes; each look copies it to the host. For verification.

    Attributes:
        span: the tokens.
        state: the buffers.
    """

    span: Span
    state: State

    @property
    def hidden(self) -> Array:
        """Hidden states, [C, D] float."""
        return self._buffers.hidden.read()[self._rows(self.span.loop)]

    @property
    def latents(self) -> list[Array]:
        """Latent states of every layer, [C, D] float; empty where the gate has none."""
        latent, plan = self._buffers.latent, self.state.plan
        if latent is None:
            return []
        flat = latent.read().reshape(-1, plan.shape.hidden_size)
        stride, rows = len(self.span.ids) if self.span.is_chunk else plan.batch, self._rows(self.span.loop)
        return [flat[layer_idx * stride :][rows] for layer_idx in range(plan.shape.layers)]

    @property
    def exit_logits(self) -> Array | None:
        """Of every token, [C] float; None where the model has no exit gate."""
        exit_logit = self._buffers.exit_logit
        return None if exit_logit is None else exit_logit.read()[self._rows(self.span.loop - 1)]

    @property
    def _buffers(self) -> TokenRows:
        return self.state.chunk if self.span.is_chunk else self.state.step

    def _rows(self, loop: int) -> slice:
        first = 0 if self.span.is_chunk else self.state.step_row(self.span.slot, loop)
        return slice(first, first + len(self.span.ids))


class Executor:
    """Drives the graphs over one state.

    Attributes:
        sessions: the graphs.
        state: the buffers.
        slots: which sequence owns which of them.
        sampler: chooses tokens on the device; None on the CPU, and for several slots.
        mixes_loops: whether the tokens of one pass may be at different loops. Not where the graph is told its number,
            and not on a device, where latent states start anew all at once.
        shares_cache: whether one cache serves all loops.
    """

    def __init__(self, sessions: Sessions, state: State):
        plan = state.plan
        self.sessions, self.state, self.slots = sessions, state, Slots(state)
        self.sampler: DeviceSampler | None = None
        if sessions.greedy is not None and sessions.sample is not None and plan.batch == 1:
            place = (state.device, state.step.ids.device_id)
            self.sampler = DeviceSampler(sessions.greedy, sessions.sample, plan.shape.vocab_size, *place)
            self._draws = self.sampler.bind(state.step.ids)
        self.mixes_loops = not plan.shape.has_loop_idx and state.device == "cpu"
        self.shares_cache = plan.shape.cache_kind == "shared"
        self._bindings = Bindings(sessions, state, self.sampler)
        self._drawn: int | None = None  # the token that the device put into the ids itself
        self._ids: Array = np.zeros(state.step.ids.shape, dtype=np.int64)
        self._placed: dict[int, int] = {}  # rows of the pass before, and the positions where they wrote
        if self._bindings.captured:
            self._capture()

    @property
    def wave_obstacle(self) -> str | None:
        """Why consecutive tokens cannot share a pass here; None where they can."""
        if self.state.device != "cpu":
            return "it runs on the CPU only so far"
        if self.state.plan.shape.has_loop_idx:
            return "the model's gate ('mean') is told one loop for all tokens of a pass"
        return None

    def run(self, spans: Sequence[Span]) -> None:
        """One pass: one loop of each span.

        A token of a wave sees those before it as they are after this very loop of theirs. What a token that is dropped
        wrote is overwritten by the next one at its position.

        Args:
            spans: a chunk; or single tokens, which are at the same loop unless ``mixes_loops``; or over MELT's one
                cache the wave of one slot, oldest first. Those of a slot follow each other from its cached length on
                and fit into its capacity.

        Raises:
            RunError: ONNX Runtime could not.
        """
        loop_idx = spans[0].loop
        if self.state.loop_idx is not None:
            self.state.loop_idx.write(np.array([loop_idx]))
        if spans[0].is_chunk:
            self._run_chunk(spans[0])
        elif spans[0].is_wave and self.shares_cache:
            self._run_wave(spans)
        else:
            assert self.mixes_loops or all(span.loop == loop_idx for span in spans)
            self._run_steps(spans)
        for span in spans:
            span.loop += 1

    def compute_logits(self, spans: Sequence[Span]) -> list[Array]:
        """Runs the head over the last token of each span of one pass.

        Returns:
            Logits of each, [V] float32: views that the next call overwrites.
        """
        first, logits = spans[0], self.state.logits.values()
        if first.is_chunk:
            self._bindings.chunk_head(len(first.ids)).run()
            return [logits[0]]
        if first.is_wave and self.shares_cache:
            begin = min(span.row for span in spans)
            self._bindings.wave_head(begin + self._wave_base(first.slot), len(spans)).run()
            return [logits[span.row - begin] for span in spans]
        rows = [self.state.step_row(span.slot, span.loop) for span in spans]
        places, place = {}, 0
        for row, count in _ranges(sorted(rows), _BRIDGED):
            self._bindings.step_head(row, count, place).run()
            places.update({row + offset: logits[place + offset] for offset in range(count)})
            place += count
        return [places[row] for row in rows]

    def exit_logit(self, span: Span) -> Array:
        """What the exit gate says of a single token after its last pass, before the sigmoid, [1] float64."""
        assert not span.is_chunk
        rows, row = self.state.step, self.state.step_row(span.slot, span.loop - 1)
        if span.is_wave and self.state.wave is not None:
            rows, row = self.state.wave, self._wave_base(span.slot) + span.row
        buffer = rows.exit_logit
        assert buffer is not None
        value = buffer.values()[row : row + 1]
        if buffer.element_type == BFLOAT16:
            value = (value.astype(np.uint32) << 16).view(np.float32)
        return value.astype(np.float64)

    def fill_caches(self, span: Span) -> None:
        """Copies a LoopLM's keys and values of the last loop that a span took to the caches of those that it did not.

        As Ouro does (arXiv 2510.25741): later tokens find at every loop what the token had when it left.
        """
        slot, rows = span.slot, slice(span.start, span.start + 1)
        for layer, pair in enumerate(self.state.caches[span.depth - 1]):
            for place, source in enumerate(pair):
                values = source.values()[slot, :, rows]
                for cache_set in range(span.depth, span.caches):
                    with self.state.caches[cache_set][layer][place].on_host() as target:
                        target[slot, :, rows] = values

    def keep_end(self, span: Span) -> None:
        """Keeps the last hidden state of a prompt that ends with ``span``, which took all its loops and was counted."""
        rows = self.state.chunk if span.is_chunk else self.state.step
        row = len(span.ids) - 1 if span.is_chunk else self.state.step_row(span.slot, span.loop)
        self.slots[span.slot].keep_end(rows.hidden.values()[row], span.depth)

    def recall_end(self, span: Span) -> None:
        """Puts a kept hidden state where ``compute_logits`` and ``draw`` read that of ``span``, the prompt's last
        token."""
        with self.state.step.hidden.on_host() as hidden:
            hidden[self.state.step_row(span.slot, span.loop)] = self.slots[span.slot].prompt_end

    def draw(self, span: Span) -> int:
        """The token after ``span``, chosen on the device as its sampler was told; it is there for the next pass.

        Raises:
            NumericalError: the logits hold NaN or infinity.
        """
        assert self.sampler is not None
        rows = self.state.chunk if span.is_chunk else self.state.step
        row = len(span.ids) - 1 if span.is_chunk else self.state.step_row(span.slot, span.loop)
        self._bindings.device_head(rows, row).run()
        self._drawn = self.sampler.draw(self._draws)
        return self._drawn

    def _run_chunk(self, span: Span) -> None:
        rows, tokens = self.state.chunk, len(span.ids)
        if span.loop == 0:
            self._require_place(span)
            _write_ids(rows, 0, span.ids)
            _place(rows, span.start + tokens - 1)
            self._bindings.embed_chunk(tokens).run()
        self._bindings.chunk(tokens, self._cell(span)).run()

    def _run_wave(self, spans: Sequence[Span]) -> None:
        """One loop of consecutive tokens of one slot over MELT's cache."""
        for place, span in enumerate(spans):
            if span.row < 0:
                self._enter(spans[:place], span)
        first, rows = spans[0], self.state.wave
        assert rows is not None
        _place(rows, spans[-1].start)
        self._bindings.wave(self._wave_base(first.slot) + first.row, len(spans), first.slot).run()

    def _wave_base(self, slot: int) -> int:
        """The first of a slot's rows among those of all waves."""
        return slot * 2 * MOST_IN_FLIGHT

    def _enter(self, before: Sequence[Span], span: Span) -> None:
        """Gives a token of a wave its row behind the others, and the state before its first loop."""
        self._require_place(span)
        rows, base = self.state.wave, self._wave_base(span.slot)
        assert rows is not None
        span.row = before[-1].row + 1 if before else 0
        if span.row == 2 * MOST_IN_FLIGHT:
            # At the end of the rows all go back to their beginning.
            first, count = base + before[0].row, len(before)
            for buffer in (rows.hidden, rows.latent):
                if buffer is not None:
                    values = buffer.values()
                    values[..., base : base + count, :] = values[..., first : first + count, :].copy()
            for place, other in enumerate((*before, span)):
                other.row = place
        _write_ids(rows, base + span.row, span.ids)
        self._bindings.wave_embed(base + span.row).run()
        if rows.latent is not None:
            rows.latent.values()[:, base + span.row] = 0

    def _run_steps(self, spans: Sequence[Span]) -> None:
        starting = [span for span in spans if span.loop == 0]
        if starting:
            self._embed_steps(starting)
        placed = {self._cell(span): span.start for span in spans}
        groups = self._bridge(placed, spans)
        rows = {self._row(cell): position for cell, position in placed.items()}
        if rows != self._placed:
            self._place_steps(rows)
        # The deepest first: a LoopLM's token moves on to where that of the next loop was.
        for cell, count in reversed(groups):
            self._bindings.steps(cell, count).run()

    def _cell(self, span: Span) -> int:
        """Of the cache, for a span's next loop."""
        plan = self.state.plan
        return plan.cache_set(span.loop) * plan.batch + span.slot

    def _row(self, cell: int) -> int:
        """Where the single token lies that reads a cell."""
        return cell if self.state.row_shift else cell % self.state.plan.batch

    def _embed_steps(self, spans: Sequence[Span]) -> None:
        """Makes the state before the first loop of single tokens."""
        rows, plan = self.state.step, self.state.plan
        # A LoopLM's tokens lie elsewhere from their first loop on.
        under_way = not self.state.row_shift and any(
            span.loop and not span.is_chunk and not span.is_wave for slot in self.slots for span in slot.flight
        )
        for span in spans:
            self._require_place(span)
            self._ids[span.slot] = span.ids[0]
        if plan.batch > 1 or spans[0].ids[0] != self._drawn:
            rows.ids.write(self._ids)
        self._drawn = None
        if not under_way:
            self._bindings.embed_steps(0, plan.batch).run()  # nobody's hidden state is lost by taking all
            return
        for first, count in _ranges(sorted(span.slot for span in spans)):
            self._bindings.embed_steps(first, count).run()
            if rows.latent is not None:
                with rows.latent.on_host() as latent:
                    latent[:, first : first + count] = 0

    def _require_place(self, span: Span) -> None:
        """Holds a span that begins to what is said of ``run``'s."""
        slot = self.slots[span.slot]
        assert span in slot.flight
        assert span.start == slot.length + sum(len(other.ids) for other in slot.flight[: slot.flight.index(span)])
        assert len(span.ids) <= slot.room

    def _bridge(self, placed: dict[int, int], spans: Sequence[Span]) -> list[tuple[int, int]]:
        """Ranges of neighbouring cells that cover ``placed``: cells in between that have a row to spare join them.

        Some rows more cost less than reading the weights again.
        """
        if len(placed) == 1:
            return [(next(iter(placed)), 1)]
        for before, after in pairwise(sorted(placed)):
            between = range(before + 1, after if after - before - 1 <= _BRIDGED else before + 1)
            spare = {cell: self._spare_row(cell, spans) for cell in between}
            if None not in spare.values():
                placed.update({cell: row for cell, row in spare.items() if row is not None})
        return _ranges(sorted(placed))

    def _spare_row(self, cell: int, spans: Sequence[Span]) -> int | None:
        cache_set, number = divmod(cell, self.state.plan.batch)
        return self.slots[number].spare_row(cache_set, spans)

    def _place_steps(self, placed: dict[int, int]) -> None:
        """Says at which rows of the cache the tokens of the next passes are, by the rows where they lie."""
        rows, plan = self.state.step, self.state.plan
        last_row: Array = np.zeros(rows.last_row.shape, dtype=np.int32)
        for row, position in placed.items():
            last_row[row] = position
        rows.last_row.write(last_row)
        # A captured graph holds the length that it was captured with.
        longest = plan.capacity if self._bindings.captured else max(placed.values()) + 1
        rows.total_length.write(np.array([longest], dtype=np.int32))
        self._placed = placed

    def _capture(self) -> None:
        """Captures a decoded token's graphs while the state is empty: ONNX Runtime runs each more than once for that,
        and a loop in place that runs again goes on from its own result."""
        state, bindings = self.state, self._bindings
        state.step.ids.write(self._ids)
        self._place_steps({0: 0})
        self._placed = {}
        if state.loop_idx is not None:
            state.loop_idx.write(np.array([0]))
        bindings.embed_steps(0, 1).run()
        for cell in range(state.plan.cells):
            bindings.steps(cell, 1).run()
        if self.sampler is not None:
            bindings.device_head(state.step, 0).run()


def _write_ids(rows: TokenRows, first: int, ids: Sequence[int]) -> None:
    """Writes the token ids of a chunk, or of a wave's token, where they are read."""
    staged: Array = np.zeros(rows.ids.shape, dtype=np.int64)
    staged[0, first : first + len(ids)] = ids
    rows.ids.write(staged)


def _place(rows: TokenRows, last: int) -> None:
    """Says at which row of the cache the last token of a chunk, or of a wave, is."""
    rows.last_row.write(np.array([last], dtype=np.int32))
    rows.total_length.write(np.array([last + 1], dtype=np.int32))


def _ranges(numbers: Sequence[int], most_between: int = 0) -> list[tuple[int, int]]:
    """Ranges, (first, count), of ascending numbers, in which no more than so many are missing between two."""
    ranges: list[tuple[int, int]] = []
    for number in numbers:
        if ranges and number - sum(ranges[-1]) <= most_between:
            ranges[-1] = (ranges[-1][0], number - ranges[-1][0] + 1)
        else:
            ranges.append((number, 1))
    return ranges
