"""The loop driver: embeds a chunk, runs the loop graph over it T times in place, advances.

Buffers are bound by address, so a step feeds no arrays: token ids and lengths go in, logits of the last position come
out. Knows token ids, not text.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort

from melt_runtime.contract import ModelShape, cache_names, latent_names
from melt_runtime.errors import TokenError
from melt_runtime.state import Array, Buffer, State

Observer = Callable[[int], None]
"""Called after every loop with its index, while the state holds that loop's values; for verification."""


@dataclass(frozen=True)
class Sessions:
    """The three graphs, opened on one provider."""

    embed: ort.InferenceSession
    loop: ort.InferenceSession
    head: ort.InferenceSession


@dataclass(frozen=True)
class Binding:
    """The state's buffers bound for one step shape [batch, chunk]; the loop has one binding per cache set."""

    batch: int
    chunk: int
    embed: ort.IOBinding
    loops: tuple[ort.IOBinding, ...]
    head: ort.IOBinding


class LoopRunner:
    """Drives the graphs over one state."""

    def __init__(self, sessions: Sessions, state: State):
        self.sessions = sessions
        self.state = state
        self._step = self._bind(state.plan.batch, 1, 0, state.step_ids, state.step_last_row)
        self._chunk = {0: self._bind_chunk(state.plan.chunk, 0)}

    def prefill(
        self,
        ids: Sequence[int],
        loops: int,
        chunk: int | None = None,
        sequence: int = 0,
        observe: Observer | None = None,
    ) -> Array:
        """Appends ``ids`` to one sequence, chunk after chunk.

        Args:
            ids: token ids, at least one.
            loops: depth T.
            chunk: tokens in parallel C; default: what the state was made for. Another value gives other numbers.
            sequence: row of the batch.
            observe: called after every loop.

        Returns:
            Logits of the last token, [V] float32, a view that the next step overwrites.

        Raises:
            TokenError: no ids, or ids outside the vocabulary.
            ValueError: ``loops`` or ``chunk`` outside its rule.
            CapacityError: the ids do not fit; nothing was computed.
        """
        state, plan = self.state, self.state.plan
        chunk = plan.chunk if chunk is None else chunk
        if not 1 <= chunk <= plan.chunk:
            raise ValueError(f"chunk must be in [1, {plan.chunk}], the state's chunk, got {chunk}")
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
        self.sessions.head.run_with_iobinding(binding.head)
        logits: Array = self._logits()[sequence]
        return logits

    def decode(self, ids: Sequence[int], loops: int, observe: Observer | None = None) -> Array:
        """Appends one token to every sequence of the batch; they may have different lengths.

        Args:
            ids: one token id a sequence.
            loops: depth T.
            observe: called after every loop.

        Returns:
            Logits, [B, V] float32, a view that the next step overwrites.

        Raises:
            TokenError, ValueError, CapacityError: as for ``prefill``.
        """
        state, batch = self.state, self.state.plan.batch
        tokens = check_ids(ids, state.plan.shape)
        if len(tokens) != batch:
            raise ValueError(f"ids must hold one token for each of {batch} sequences, got {len(tokens)}")
        state.require_loops(loops, int(state.lengths.max()))
        for sequence in range(batch):
            state.require_room(1, sequence)
        state.step_ids.write(tokens[:, None])
        state.step_last_row.write(state.lengths.astype(np.int32))
        state.total_length.write(np.array([state.lengths.max() + 1], dtype=np.int32))
        self._run_loops(self._step, loops, observe)
        for sequence in range(batch):
            state.advance(1, sequence, loops)
        self.sessions.head.run_with_iobinding(self._step.head)
        return self._logits()

    def _run_loops(self, binding: Binding, loops: int, observe: Observer | None) -> None:
        self.sessions.embed.run_with_iobinding(binding.embed)
        for loop_idx in range(loops):
            if self.state.loop_idx is not None:
                self.state.loop_idx.write(np.array([loop_idx]))
            self.sessions.loop.run_with_iobinding(binding.loops[self.state.plan.cache_set(loop_idx)])
            if observe is not None:
                observe(loop_idx)

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

    def _bind(self, batch: int, chunk: int, sequence: int, ids: Buffer, last_row: Buffer) -> Binding:
        """Binds every tensor of a step over ``batch`` sequences from ``sequence`` on."""
        state, shape = self.state, self.state.plan.shape
        hidden = (batch, chunk, shape.hidden_size)
        embed = self.sessions.embed.io_binding()
        _bind_input(embed, "ids", ids, (batch, chunk))
        _bind_output(embed, "hidden", state.hidden, hidden)
        if state.latent is not None:
            _bind_output(embed, "latent", state.latent, (shape.layers, *hidden))
        loops = tuple(
            self._bind_loop(cache_set, hidden, sequence, last_row) for cache_set in range(state.plan.cache_sets)
        )
        head = self.sessions.head.io_binding()
        last = (chunk - 1) * shape.hidden_size  # of a chunk only the last position is needed
        _bind_input(head, "hidden", state.hidden, (batch, 1, shape.hidden_size), last)
        logits = (batch, 1, shape.vocab_size)
        _bind_output(head, "logits", state.logits, logits, sequence * shape.vocab_size)
        return Binding(batch, chunk, embed, loops, head)

    def _bind_loop(
        self, cache_set: int, hidden: tuple[int, int, int], sequence: int, last_row: Buffer
    ) -> ort.IOBinding:
        """Binds one loop in place: each output to the buffer of its input."""
        state, shape = self.state, self.state.plan.shape
        batch, chunk, width = hidden
        loop = self.sessions.loop.io_binding()
        _bind_input(loop, "hidden", state.hidden, hidden)
        _bind_output(loop, "hidden_out", state.hidden, hidden)
        cache_shape = (batch, *state.plan.cache_shape[1:])
        first_row = sequence * int(np.prod(cache_shape[1:]))
        for layer_idx in range(shape.layers):
            if state.latent is not None:
                name_in, name_out = latent_names(layer_idx)
                offset = layer_idx * batch * chunk * width
                _bind_input(loop, name_in, state.latent, hidden, offset)
                _bind_output(loop, name_out, state.latent, hidden, offset)
            pairs = zip(cache_names(layer_idx), state.caches[cache_set][layer_idx], strict=True)
            for (name_in, name_out), buffer in pairs:
                _bind_input(loop, name_in, buffer, cache_shape, first_row)
                _bind_output(loop, name_out, buffer, cache_shape, first_row)
        _bind_input(loop, "seqlens_k", last_row, (batch,))
        _bind_input(loop, "total_sequence_length", state.total_length, ())
        if state.loop_idx is not None:
            _bind_input(loop, "loop_idx", state.loop_idx, ())
        if state.exit_logit is not None:
            _bind_output(loop, "exit_logit", state.exit_logit, (batch, chunk, 1))
        return loop


def check_ids(ids: Sequence[int], shape: ModelShape) -> Array:
    """Token ids as an array [L] int64.

    Raises:
        TokenError: no ids, not whole numbers, or outside the vocabulary.
    """
    tokens = np.asarray(ids)
    if tokens.ndim != 1 or tokens.size == 0:
        raise TokenError(f"token ids must be a sequence of at least one, got shape {list(tokens.shape)}")
    if not np.issubdtype(tokens.dtype, np.integer):
        raise TokenError(f"token ids must be whole numbers, got {tokens.dtype}")
    unknown = tokens[(tokens < 0) | (tokens >= shape.vocab_size)]
    if unknown.size:
        raise TokenError(f"token ids must be in [0, {shape.vocab_size}), got {sorted(set(unknown.tolist()))[:8]}")
    return tokens.astype(np.int64)


def _bind_input(binding: ort.IOBinding, name: str, buffer: Buffer, shape: Sequence[int], offset: int = 0) -> None:
    binding.bind_input(name, *_place(buffer, shape, offset))


def _bind_output(binding: ort.IOBinding, name: str, buffer: Buffer, shape: Sequence[int], offset: int = 0) -> None:
    binding.bind_output(name, *_place(buffer, shape, offset))


def _place(buffer: Buffer, shape: Sequence[int], offset: int) -> tuple[Any, ...]:
    return buffer.device, 0, buffer.dtype.type, list(shape), buffer.address(offset)
