"""The loop driver: embeds a chunk, runs the loop graph over it T times in place, advances.

Buffers are bound by address, so a step feeds no arrays: token ids and lengths go in; logits of the last position come
out, or on a device the token that was drawn from them there. Knows token ids, not text.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnxruntime as ort

from melt_runtime.arguments import function_or_none, is_whole, shown, whole_number
from melt_runtime.bundle.contract import ModelShape, cache_names, latent_names
from melt_runtime.errors import RunError, TokenError
from melt_runtime.execute.device_sampler import DeviceSampler
from melt_runtime.hold import Hold
from melt_runtime.state import Array, Buffer, State

Observer = Callable[[int], None]
"""Called after every loop with its index, while the state holds that loop's values; for verification."""

Progress = Callable[[int, int], None]
"""Called after every chunk of a prompt with the tokens that are done and all of them."""

_NOT_CAPTURED = -1  # what ONNX Runtime takes for a run that is no CUDA graph


@dataclass(frozen=True)
class Sessions:
    """The graphs, opened on one provider.

    Attributes:
        greedy: chooses tokens on the device; None on the CPU.
        sample: likewise.
        replayed: whether steps are captured as CUDA graphs.
        graph_ids: numbers for captured graphs, each given once.
    """

    embed: ort.InferenceSession
    loop: ort.InferenceSession
    head: ort.InferenceSession
    greedy: ort.InferenceSession | None = None
    sample: ort.InferenceSession | None = None
    replayed: bool = False
    graph_ids: Iterator[int] = field(default_factory=lambda: itertools.count(1))


@dataclass(frozen=True)
class Bound:
    """A graph with its buffers, ready to run."""

    session: ort.InferenceSession
    binding: ort.IOBinding
    options: ort.RunOptions | None

    def run(self) -> None:
        """Runs it; what it gives lies in the buffers.

        Raises:
            RunError: ONNX Runtime could not.
        """
        try:
            self.session.run_with_iobinding(self.binding, self.options)
        except Exception as error:  # ONNX Runtime has no common base class below Exception
            raise RunError(f"ONNX Runtime cannot run a graph of the bundle: {error}") from error


@dataclass(frozen=True)
class Binding:
    """The state's buffers bound for one step shape [batch, chunk].

    Attributes:
        embed: token ids to the state before the first loop.
        loops: one for each cache set.
        head: to the logits on the host.
        device_head: to the logits on the device, for the sampler there; None on the CPU.
    """

    embed: Bound
    loops: tuple[Bound, ...]
    head: Bound
    device_head: Bound | None


class LoopRunner:
    """Drives the graphs over one state, one call at a time: another, from any thread, is refused with ``BusyError``.

    Attributes:
        sessions: the graphs.
        state: the buffers.
        sampler: chooses tokens on the device; None on the CPU, and for several sequences.
    """

    def __init__(self, sessions: Sessions, state: State):
        self.sessions = sessions
        self.state = state
        self._hold = Hold("this runner is at work in another thread: make one for each with model.new_runner()")
        self.sampler: DeviceSampler | None = None
        if sessions.greedy is not None and sessions.sample is not None and state.plan.batch == 1:
            place = (state.device, state.step_ids.device_id)
            self.sampler = DeviceSampler(sessions.greedy, sessions.sample, state.plan.shape.vocab_size, *place)
            self._draws = self.sampler.bind(state.step_ids)
        self._drawn: int | None = None  # the token that the device put into step_ids itself
        self._step = self._bind(state.plan.batch, 1, 0, state.step_ids, state.step_last_row, captured=True)
        self._chunk = {0: self._bind_chunk(state.plan.chunk, 0)}
        if sessions.replayed:
            self._capture()

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
            binding = self._prefill(ids, loops, chunk, sequence, observe, progress)
            binding.head.run()
            logits: Array = self._logits()[sequence]
        return logits

    def prefill_and_draw(self, ids: Sequence[int], loops: int, progress: Progress | None = None) -> int:
        """As ``prefill``, and draws the next token on the device with the sampler's settings.

        Raises:
            NumericalError: the logits hold NaN or infinity.
            TokenError, ValueError, CapacityError, BusyError: as for ``prefill``, or there is no sampler.
        """
        with self._hold.taken():
            self._require_sampler()
            return self._draw(self._prefill(ids, loops, None, 0, None, progress))

    def _prefill(
        self,
        ids: Sequence[int],
        loops: int,
        chunk: int | None,
        sequence: int,
        observe: Observer | None,
        progress: Progress | None,
    ) -> Binding:
        """Everything up to the head; returns the last chunk's binding."""
        state, plan = self.state, self.state.plan
        function_or_none("observe", observe)
        function_or_none("progress", progress)
        chunk = plan.chunk if chunk is None else whole_number("chunk", chunk, 1, plan.chunk, " (the state's chunk)")
        tokens = check_ids(ids, plan.shape)
        state.require_loops(loops, int(state.lengths.max()))
        state.require_room(len(tokens), sequence)
        for start in range(0, len(tokens), chunk):
            piece = tokens[start : start + chunk]
            binding = self._chunk_binding(len(piece), sequence)
            staged: Array = np.zeros(state.chunk_ids.shape, dtype=np.int64)
            staged[0, : len(piece)] = piece
            state.chunk_ids.write(staged)
            end = int(state.lengths[sequence]) + len(piece)
            state.chunk_last_row.write(np.array([end - 1], dtype=np.int32))
            state.total_length.write(np.array([end], dtype=np.int32))
            self._run_loops(binding, loops, observe)
            state.advance(len(piece), sequence, loops)
            if progress is not None:
                progress(start + len(piece), len(tokens))
        return binding

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
            self._decode(ids, loops, observe)
            self._step.head.run()
            return self._logits()

    def decode_and_draw(self, token: int, loops: int) -> int:
        """As ``decode`` for one sequence, and draws the next token on the device with the sampler's settings.

        A token that the device drew is there already and is not sent again.

        Raises:
            NumericalError: the logits hold NaN or infinity.
            TokenError, ValueError, CapacityError, BusyError: as for ``prefill``, or there is no sampler.
        """
        with self._hold.taken():
            self._require_sampler()
            self._decode([token], loops, None)
            return self._draw(self._step)

    def _decode(self, ids: Sequence[int], loops: int, observe: Observer | None) -> None:
        """Everything up to the head."""
        state, batch = self.state, self.state.plan.batch
        function_or_none("observe", observe)
        tokens = check_ids(ids, state.plan.shape)
        if len(tokens) != batch:
            raise ValueError(f"ids must hold one token for each of {batch} sequences, got {len(tokens)}")
        state.require_loops(loops, int(state.lengths.max()))
        for sequence in range(batch):
            state.require_room(1, sequence)
        if len(tokens) > 1 or tokens[0] != self._drawn:
            state.step_ids.write(tokens[:, None])
        self._drawn = None
        state.step_last_row.write(state.lengths.astype(np.int32))
        # A captured graph holds the length that it was captured with.
        longest = state.plan.capacity if self.sessions.replayed else state.lengths.max() + 1
        state.total_length.write(np.array([longest], dtype=np.int32))
        self._run_loops(self._step, loops, observe)
        for sequence in range(batch):
            state.advance(1, sequence, loops)

    def _require_sampler(self) -> None:
        if self.sampler is None:
            raise ValueError("this runner cannot draw tokens on a device: it runs on the CPU, or several sequences")

    def _draw(self, binding: Binding) -> int:
        assert self.sampler is not None
        assert binding.device_head is not None
        binding.device_head.run()
        self._drawn = self.sampler.draw(self._draws)
        return self._drawn

    def _run_loops(self, binding: Binding, loops: int, observe: Observer | None) -> None:
        binding.embed.run()
        for loop_idx in range(loops):
            if self.state.loop_idx is not None:
                self.state.loop_idx.write(np.array([loop_idx]))
            binding.loops[self.state.plan.cache_set(loop_idx)].run()
            if observe is not None:
                observe(loop_idx)

    def _capture(self) -> None:
        """Captures a decoded token's graphs while the state is empty: ONNX Runtime runs each more than once for that,
        and a loop in place that runs again goes on from its own result."""
        state = self.state
        state.step_ids.write(np.zeros(state.step_ids.shape, dtype=np.int64))
        state.step_last_row.write(np.zeros(state.step_last_row.shape, dtype=np.int32))
        state.total_length.write(np.array([state.plan.capacity], dtype=np.int32))
        if state.loop_idx is not None:
            state.loop_idx.write(np.array([0]))
        for bound in (self._step.embed, *self._step.loops, self._step.device_head):
            if bound is not None:
                bound.run()

    def _logits(self) -> Array:
        return self.state.logits.value.numpy()  # type: ignore[no-any-return]

    def _chunk_binding(self, chunk: int, sequence: int) -> Binding:
        """Full chunks keep their binding; the shorter last chunk of a prompt gets one of its own."""
        if chunk != self.state.plan.chunk:
            return self._bind_chunk(chunk, sequence)
        if sequence not in self._chunk:
            self._chunk[sequence] = self._bind_chunk(chunk, sequence)
        return self._chunk[sequence]

    def _bind_chunk(self, chunk: int, sequence: int) -> Binding:
        return self._bind(1, chunk, sequence, self.state.chunk_ids, self.state.chunk_last_row)

    def _bind(
        self, batch: int, chunk: int, sequence: int, ids: Buffer, last_row: Buffer, captured: bool = False
    ) -> Binding:
        """Binds every tensor of a step over ``batch`` sequences from ``sequence`` on."""
        state, shape, sessions = self.state, self.state.plan.shape, self.sessions
        hidden = (batch, chunk, shape.hidden_size)
        embed = sessions.embed.io_binding()
        ids.bind_input(embed, "ids", (batch, chunk))
        state.hidden.bind_output(embed, "hidden", hidden)
        if state.latent is not None:
            state.latent.bind_output(embed, "latent", (shape.layers, *hidden))
        loops = tuple(
            self._bind_loop(cache_set, hidden, sequence, last_row) for cache_set in range(state.plan.cache_sets)
        )
        last = (chunk - 1) * shape.hidden_size  # of a chunk only the last position is needed
        head, device_head = sessions.head.io_binding(), sessions.head.io_binding()
        for binding in (head, device_head):
            state.hidden.bind_input(binding, "hidden", (batch, 1, shape.hidden_size), last)
        logits = (batch, 1, shape.vocab_size)
        state.logits.bind_output(head, "logits", logits, sequence * shape.vocab_size)
        if self.sampler is not None:
            self.sampler.logits.bind_output(device_head, "logits")
        return Binding(
            Bound(sessions.embed, embed, self._run_options(captured)),
            tuple(Bound(sessions.loop, loop, self._run_options(captured)) for loop in loops),
            Bound(sessions.head, head, self._run_options(False)),
            None if self.sampler is None else Bound(sessions.head, device_head, self._run_options(captured)),
        )

    def _run_options(self, captured: bool) -> ort.RunOptions | None:
        """Tells ONNX Runtime which captured graph a binding is, where graphs are captured."""
        if not self.sessions.replayed:
            return None
        options = ort.RunOptions()
        number = next(self.sessions.graph_ids) if captured else _NOT_CAPTURED
        options.add_run_config_entry("gpu_graph_id", str(number))
        return options

    def _bind_loop(
        self, cache_set: int, hidden: tuple[int, int, int], sequence: int, last_row: Buffer
    ) -> ort.IOBinding:
        """Binds one loop in place: each output to the buffer of its input."""
        state, shape = self.state, self.state.plan.shape
        batch, chunk, width = hidden
        loop = self.sessions.loop.io_binding()
        state.hidden.bind_input(loop, "hidden", hidden)
        state.hidden.bind_output(loop, "hidden_out", hidden)
        cache_shape = (batch, *state.plan.cache_shape[1:])
        first_row = sequence * int(np.prod(cache_shape[1:]))
        for layer_idx in range(shape.layers):
            if state.latent is not None:
                name_in, name_out = latent_names(layer_idx)
                offset = layer_idx * batch * chunk * width
                state.latent.bind_input(loop, name_in, hidden, offset)
                state.latent.bind_output(loop, name_out, hidden, offset)
            pairs = zip(cache_names(layer_idx), state.caches[cache_set][layer_idx], strict=True)
            for (name_in, name_out), buffer in pairs:
                buffer.bind_input(loop, name_in, cache_shape, first_row)
                buffer.bind_output(loop, name_out, cache_shape, first_row)
        last_row.bind_input(loop, "seqlens_k", (batch,))
        state.total_length.bind_input(loop, "total_sequence_length", ())
        if state.loop_idx is not None:
            state.loop_idx.bind_input(loop, "loop_idx", ())
        if state.exit_logit is not None:
            state.exit_logit.bind_output(loop, "exit_logit", (batch, chunk, 1))
        return loop


def check_ids(ids: Sequence[int], shape: ModelShape) -> Array:
    """Token ids as an array [L] int64.

    Args:
        ids: a sequence of whole numbers, Python's or numpy's, or an array of them; never bytes or truth values.
        shape: the model.

    Raises:
        TokenError: no ids, not whole numbers, or outside the vocabulary.
    """
    if isinstance(ids, np.ndarray):
        if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
            raise TokenError(f"token ids must be whole numbers in one row, got {ids.dtype} {list(ids.shape)}")
        tokens = ids
    else:
        if not isinstance(ids, Sequence) or isinstance(ids, str | bytes | bytearray | memoryview):
            raise TokenError(f"token ids must be a sequence of whole numbers, got {shown(ids)}")
        for token in ids:
            if not is_whole(token):
                raise TokenError(f"token ids must be whole numbers, got {shown(token)} among them")
        tokens = np.array([min(max(int(token), -1), shape.vocab_size) for token in ids])
    if tokens.size == 0:
        raise TokenError("token ids must be a sequence of at least one")
    outside = np.flatnonzero((tokens < 0) | (tokens >= shape.vocab_size))
    if outside.size:
        found = ", ".join(shown(int(ids[place])) for place in outside[:8])
        raise TokenError(f"token ids must be in [0, {shape.vocab_size}), got [{found}]")
    return tokens.astype(np.int64)
