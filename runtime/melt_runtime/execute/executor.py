"""Runs passes of the loop graph: the only writer of the cache. Knows slots and token ids, nothing of text, or of why.

A pass is one loop, over a chunk of one sequence or over one token of each of several, which may be at different loops.
What goes in are token ids and positions; what comes out are logits where they are asked for, or on a device the token
that was drawn from them there.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from melt_runtime.execute.bindings import Bindings, Sessions
from melt_runtime.execute.device_sampler import DeviceSampler
from melt_runtime.execute.slots import Slots
from melt_runtime.memory.buffers import BFLOAT16, State, TokenRows
from melt_runtime.memory.plan import Array
from melt_runtime.schedule.span import Span


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
        return self._buffers.hidden.read()[self._here]

    @property
    def latents(self) -> list[Array]:
        """Latent states of every layer, [C, D] float; empty where the gate has none."""
        latent, plan = self._buffers.latent, self.state.plan
        if latent is None:
            return []
        flat = latent.read().reshape(-1, plan.shape.hidden_size)
        stride = len(self.span.ids) if self.span.is_chunk else plan.batch
        return [flat[layer_idx * stride :][self._here] for layer_idx in range(plan.shape.layers)]

    @property
    def exit_logits(self) -> Array | None:
        """Of every token, [C] float; None where the model has no exit gate."""
        exit_logit = self._buffers.exit_logit
        return None if exit_logit is None else exit_logit.read()[self._here]

    @property
    def _buffers(self) -> TokenRows:
        return self.state.chunk if self.span.is_chunk else self.state.step

    @property
    def _here(self) -> slice:
        first = 0 if self.span.is_chunk else self.span.slot
        return slice(first, first + len(self.span.ids))


class Executor:
    """Drives the graphs over one state.

    Attributes:
        sessions: the graphs.
        state: the buffers.
        slots: which sequence owns which of them.
        sampler: chooses tokens on the device; None on the CPU, and for several slots.
        mixes_loops: whether the tokens of one pass may be at different loops. Not where each loop has a cache of its
            own or the graph is told its number, and not on a device, where latent states start anew all at once.
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
        self.mixes_loops = plan.cache_sets == 1 and not plan.shape.has_loop_idx and state.device == "cpu"
        self.shares_cache = plan.shape.cache_kind == "shared"
        self._bindings = Bindings(sessions, state, self.sampler)
        self._drawn: int | None = None  # the token that the device put into the ids itself
        self._ids: Array = np.zeros(state.step.ids.shape, dtype=np.int64)
        self._placed: dict[int, int] = {}  # slots of the pass before, and the rows where they wrote
        if self._bindings.captured:
            self._capture()

    def run(self, spans: Sequence[Span]) -> None:
        """One pass: one loop of each span.

        Args:
            spans: a chunk, or single tokens of different slots, which are at the same loop unless ``mixes_loops``. Each
                begins at its slot's cached length and fits into its capacity.

        Raises:
            RunError: ONNX Runtime could not.
        """
        loop_idx = spans[0].loop
        if self.state.loop_idx is not None:
            self.state.loop_idx.write(np.array([loop_idx]))
        if spans[0].is_chunk:
            self._run_chunk(spans[0])
        else:
            assert self.mixes_loops or all(span.loop == loop_idx for span in spans)
            self._run_steps(spans, self.state.plan.cache_set(loop_idx))
        for span in spans:
            span.loop += 1

    @property
    def wave_obstacle(self) -> str | None:
        """Why consecutive tokens cannot share a pass here; None where they can."""
        plan = self.state.plan
        if plan.batch > 1:
            return "it serves one sequence at a time: load with slots=1"
        if self.state.device != "cpu":
            return "it runs on the CPU only so far"
        if not self.shares_cache:
            return "this model has a KV cache for each loop, it serves MELT's one cache so far"
        if plan.shape.has_loop_idx:
            return "the model's gate ('mean') is told one loop for all tokens of a pass"
        return None if plan.wave_rows > 1 else "it needs a state of chunks of at least 4 tokens"

    def run_wave(self, spans: Sequence[Span]) -> None:
        """One pass over consecutive tokens of one slot, oldest first, each at a loop of its own.

        A token sees those before it as they are after this very loop of theirs. What a token that is dropped wrote is
        overwritten by the next one at its position.

        Raises:
            RunError: ONNX Runtime could not.
        """
        for place, span in enumerate(spans):
            if span.row < 0:
                self._enter(spans[:place], span)
        self._place_chunk(spans[-1].start)
        self._bindings.wave(spans[0].row, len(spans), spans[0].slot)[0].run()
        for span in spans:
            span.loop += 1

    def compute_wave_logits(self, spans: Sequence[Span]) -> None:
        """Runs the head over every token of a wave; ``logits`` then has them, the oldest's first."""
        self._bindings.wave_head(spans[0].row, len(spans)).run()

    def _enter(self, before: Sequence[Span], span: Span) -> None:
        """Gives a token of a wave its row behind the others, and the state before its first loop."""
        rows = self.state.chunk
        span.row = before[-1].row + 1 if before else 0
        if span.row == 2 * self.state.plan.wave_rows:
            # At the end of the rows all go back to their beginning.
            first, count = before[0].row, len(before)
            for buffer in (rows.hidden, rows.latent):
                if buffer is not None:
                    with buffer.on_host() as values:
                        values[..., :count, :] = values[..., first : first + count, :].copy()
            for place, other in enumerate((*before, span)):
                other.row = place
        self._write_chunk_ids(span.row, span.ids)
        self._bindings.wave_embed(span.row).run()
        if rows.latent is not None:
            with rows.latent.on_host() as latent:
                latent[:, span.row] = 0

    def compute_logits(self, spans: Sequence[Span]) -> None:
        """Runs the head over the last token of each span of one pass; ``logits`` then has them."""
        if spans[0].is_chunk:
            self._bindings.chunk_head(len(spans[0].ids), spans[0].slot).run()
        else:
            first, last = min(span.slot for span in spans), max(span.slot for span in spans)
            self._bindings.step_head(first, last - first + 1).run()

    def logits(self, slot: int) -> Array:
        """Logits of a slot's last token, [V] float32: a view that any later pass may overwrite."""
        return self.state.logits.value.numpy()[slot]  # type: ignore[no-any-return]

    def exit_logit(self, span: Span) -> Array:
        """What the exit gate says of a single token after its last pass, before the sigmoid, [1] float64."""
        buffer = self.state.step.exit_logit
        assert buffer is not None
        assert not span.is_chunk
        value = buffer.value.numpy()[span.slot : span.slot + 1]
        if buffer.element_type == BFLOAT16:
            value = (value.astype(np.uint32) << 16).view(np.float32)
        return value.astype(np.float64)  # type: ignore[no-any-return]

    def fill_caches(self, span: Span) -> None:
        """Copies a LoopLM's keys and values of the last loop that a span took to the caches of those that it did not.

        As Ouro does (arXiv 2510.25741): later tokens find at every loop what the token had when it left.
        """
        slot, rows = span.slot, slice(span.start, span.start + 1)
        for layer, pair in enumerate(self.state.caches[span.depth - 1]):
            for place, source in enumerate(pair):
                values = source.value.numpy()[slot, :, rows]
                for cache_set in range(span.depth, span.caches):
                    with self.state.caches[cache_set][layer][place].on_host() as target:
                        target[slot, :, rows] = values

    def draw(self, span: Span) -> int:
        """The token after ``span``, chosen on the device as its sampler was told; it is there for the next pass.

        Raises:
            NumericalError: the logits hold NaN or infinity.
        """
        assert self.sampler is not None
        rows = self.state.chunk if span.is_chunk else self.state.step
        self._bindings.device_head(rows, len(span.ids) - 1).run()
        self._drawn = self.sampler.draw(self._draws)
        return self._drawn

    def _run_chunk(self, span: Span) -> None:
        tokens = len(span.ids)
        if span.loop == 0:
            self._begin(span)
            self._write_chunk_ids(0, span.ids)
            self._place_chunk(span.start + tokens - 1)
            self._bindings.embed_chunk(tokens).run()
        self._bindings.chunk(tokens, span.slot)[self.state.plan.cache_set(span.loop)].run()

    def _write_chunk_ids(self, first: int, ids: Sequence[int]) -> None:
        """Writes token ids where a chunk's, or a wave's, are read, from the row ``first`` on."""
        buffer = self.state.chunk.ids
        staged: Array = np.zeros(buffer.shape, dtype=np.int64)
        staged[0, first : first + len(ids)] = ids
        buffer.write(staged)

    def _place_chunk(self, last: int) -> None:
        """Says at which row of the cache the last token of a chunk, or of a wave, is."""
        self.state.chunk.last_row.write(np.array([last], dtype=np.int32))
        self.state.chunk.total_length.write(np.array([last + 1], dtype=np.int32))

    def _run_steps(self, spans: Sequence[Span], cache_set: int) -> None:
        starting = [span for span in spans if span.loop == 0]
        if starting:
            self._embed_steps(starting)
        placed = {span.slot: span.start for span in spans}
        groups = self._bridge(placed)
        if placed != self._placed:
            self._place(placed)
        for first, count in groups:
            self._bindings.steps(first, count)[cache_set].run()

    def _embed_steps(self, spans: Sequence[Span]) -> None:
        """Makes the state before the first loop of single tokens."""
        rows, plan = self.state.step, self.state.plan
        under_way = any(slot.flight is not None and not slot.flight.is_chunk for slot in self.slots)
        for span in spans:
            self._begin(span)
            self._ids[span.slot] = span.ids[0]
        if plan.batch > 1 or spans[0].ids[0] != self._drawn:
            rows.ids.write(self._ids)
        self._drawn = None
        if not under_way:
            self._bindings.embed_steps(0, plan.batch).run()  # nobody's hidden state is lost by taking all
            return
        for first, count in _neighbours(sorted(span.slot for span in spans)):
            self._bindings.embed_steps(first, count).run()
            if rows.latent is not None:
                with rows.latent.on_host() as latent:
                    latent[:, first : first + count] = 0

    def _begin(self, span: Span) -> None:
        slot = self.slots[span.slot]
        assert span.start == slot.length
        assert len(span.ids) <= slot.room
        slot.flight = span

    def _bridge(self, placed: dict[int, int]) -> list[tuple[int, int]]:
        """Ranges of neighbouring slots that cover ``placed``: a slot in between that has a row to spare joins them.

        One row more costs less than reading the weights again.
        """
        if len(placed) == 1:
            return [(next(iter(placed)), 1)]
        for number in range(min(placed), max(placed)):
            if number not in placed and (row := self.slots[number].spare_row) is not None:
                placed[number] = row
        return _neighbours(sorted(placed))

    def _place(self, placed: dict[int, int]) -> None:
        """Says at which rows the tokens of the next passes are."""
        rows, plan = self.state.step, self.state.plan
        last_row: Array = np.zeros(plan.batch, dtype=np.int32)
        for slot, row in placed.items():
            last_row[slot] = row
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
        self._place({0: 0})
        self._placed = {}
        if state.loop_idx is not None:
            state.loop_idx.write(np.array([0]))
        bindings.embed_steps(0, 1).run()
        for bound in bindings.steps(0, 1):
            bound.run()
        if self.sampler is not None:
            bindings.device_head(state.step, 0).run()


def _neighbours(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Ranges, (first, count), of ascending numbers."""
    ranges: list[tuple[int, int]] = []
    for number in numbers:
        if ranges and sum(ranges[-1]) == number:
            ranges[-1] = (ranges[-1][0], ranges[-1][1] + 1)
        else:
            ranges.append((number, 1))
    return ranges
