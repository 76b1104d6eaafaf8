"""The graphs with their buffers, bound by address and kept by shape, so that a pass feeds no arrays."""

import itertools
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from melt_runtime.bundle.contract import cache_names, latent_names
from melt_runtime.device.ort import ort
from melt_runtime.errors import RunError
from melt_runtime.execute.device_sampler import DeviceSampler
from melt_runtime.memory.buffers import State, TokenRows

T = TypeVar("T")

_NOT_CAPTURED = -1  # what ONNX Runtime takes for a run that is no CUDA graph
_KEPT = 64
"""Bindings of each kind that are kept; one of 24 layers takes some 30 kB and 0.2 ms to make."""


@dataclass(frozen=True)
class Sessions:
    """The graphs, opened on one provider.

    Attributes:
        greedy: chooses tokens on the device; None on the CPU.
        sample: likewise.
        prompts: the loop for passes of several rows; None where the bundle has none.
        prompt_rows: rows of a pass from which that one runs.
        replayed: whether steps are captured as CUDA graphs.
        graph_ids: numbers for captured graphs, each given once.
    """

    embed: ort.InferenceSession
    loop: ort.InferenceSession
    head: ort.InferenceSession
    greedy: ort.InferenceSession | None = None
    sample: ort.InferenceSession | None = None
    prompts: ort.InferenceSession | None = None
    prompt_rows: int = 0
    replayed: bool = False
    graph_ids: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def loop_for(self, rows: int) -> ort.InferenceSession:
        """The loop for a pass of so many rows."""
        return self.loop if self.prompts is None or rows < self.prompt_rows else self.prompts


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


class Bindings:
    """Every way in which the graphs are bound to a state.

    Attributes:
        captured: whether the token of the only slot is captured as CUDA graphs. A chunk never is: its length changes.
    """

    def __init__(self, sessions: Sessions, state: State, sampler: DeviceSampler | None):
        self._sessions, self._state, self._sampler = sessions, state, sampler
        self.captured = sessions.replayed and state.plan.batch == 1
        self._most = max(_KEPT, state.plan.cells)  # a captured token must find its own graphs again
        self._kept: dict[str, OrderedDict[Hashable, Any]] = {}

    def embed_steps(self, first: int, count: int) -> Bound:
        """Token ids of neighbouring slots to their hidden states; of all slots to their latent states too."""
        is_all = (first, count) == (0, self._state.plan.batch)
        return self._keep(
            "embed", (first, count), lambda: self._embed(self._state.step, (count, 1), first, is_all, self.captured)
        )

    def steps(self, cell: int, count: int) -> Bound:
        """One loop over single tokens that read neighbouring cells of the cache."""
        state = self._state
        row = cell if state.row_shift else cell % state.plan.batch
        return self._keep(
            "steps", (cell, count), lambda: self._loop(state.step, (count, 1), row, cell, state.plan.batch)
        )

    def step_head(self, row: int, count: int, place: int) -> Bound:
        """Their hidden states to logits, from ``place`` on."""
        return self._keep("head", (row, count, place), lambda: self._head(self._state.step, row, place, count))

    def embed_chunk(self, tokens: int) -> Bound:
        """A chunk's ids to the state before its first loop."""
        return self._keep("embed chunk", tokens, lambda: self._embed(self._state.chunk, (1, tokens), 0, True, False))

    def chunk(self, tokens: int, cell: int) -> Bound:
        """One loop over a chunk that reads and writes one cell of the cache."""
        return self._keep("chunk", (tokens, cell), lambda: self._loop(self._state.chunk, (1, tokens), 0, cell, tokens))

    def chunk_head(self, tokens: int) -> Bound:
        """The hidden state of a chunk's last token to logits."""
        return self._keep("chunk head", tokens, lambda: self._head(self._state.chunk, tokens - 1, 0, 1))

    def wave(self, row: int, tokens: int, slot: int) -> Bound:
        """One loop over consecutive tokens of a slot."""
        rows = self._wave_rows
        stride = rows.hidden.shape[0]
        return self._keep("wave", (row, tokens), lambda: self._loop(rows, (1, tokens), row, slot, stride))

    def wave_embed(self, row: int) -> Bound:
        """A token id to its hidden state there; its latent states are the caller's to clear."""
        return self._keep("wave embed", row, lambda: self._embed(self._wave_rows, (1, 1), row, False, False))

    def wave_head(self, row: int, tokens: int) -> Bound:
        """Hidden states of a wave to logits."""
        return self._keep("wave head", (row, tokens), lambda: self._head(self._wave_rows, row, 0, tokens))

    def device_head(self, rows: TokenRows, row: int) -> Bound:
        """One hidden state to the logits on the device, for the sampler there."""
        is_step = rows is self._state.step
        return self._keep("device head", (is_step, row), lambda: self._device_head(rows, row, is_step))

    @property
    def _wave_rows(self) -> TokenRows:
        rows = self._state.wave
        assert rows is not None
        return rows

    def _keep(self, kind: str, key: Hashable, make: Callable[[], T]) -> T:
        """What was made for ``key``, kept while it is among those used last."""
        kept = self._kept.setdefault(kind, OrderedDict())
        if key in kept:
            kept.move_to_end(key)
        else:
            kept[key] = make()
            if len(kept) > self._most:
                kept.popitem(last=False)
        return kept[key]  # type: ignore[no-any-return]

    def _embed(self, rows: TokenRows, shape: tuple[int, int], first: int, with_latent: bool, captured: bool) -> Bound:
        model, binding = self._state.plan.shape, self._sessions.embed.io_binding()
        hidden = (*shape, model.hidden_size)
        rows.ids.bind_input(binding, "ids", shape, first)
        rows.hidden.bind_output(binding, "hidden", hidden, first * model.hidden_size)
        if rows.latent is not None and with_latent:
            rows.latent.bind_output(binding, "latent", (model.layers, *hidden))
        return Bound(self._sessions.embed, binding, self._run_options(captured))

    def _loop(self, rows: TokenRows, shape: tuple[int, int], row: int, cell: int, stride: int) -> Bound:
        """Binds one loop in place, each output to the buffer of its input.

        Args:
            rows: where the tokens in flight lie.
            shape: [B, C].
            row: the first of these rows.
            cell: the first of the cache's cells.
            stride: rows from one layer's latent states to the next one's.
        """
        state, model = self._state, self._state.plan.shape
        is_step = rows is state.step
        hidden = (*shape, model.hidden_size)
        session = self._sessions.loop_for(shape[0] * shape[1])
        loop = session.io_binding()
        rows.hidden.bind_input(loop, "hidden", hidden, row * model.hidden_size)
        left = row + (state.row_shift if is_step else 0)
        rows.hidden.bind_output(loop, "hidden_out", hidden, left * model.hidden_size)
        cache_shape = (shape[0], *state.plan.cache_shape[1:])
        first = cell * int(np.prod(cache_shape[1:]))
        for layer_idx in range(model.layers):
            if rows.latent is not None:
                name_in, name_out = latent_names(layer_idx)
                offset = (layer_idx * stride + row) * model.hidden_size
                rows.latent.bind_input(loop, name_in, hidden, offset)
                rows.latent.bind_output(loop, name_out, hidden, offset)
            for (name_in, name_out), buffer in zip(cache_names(layer_idx), state.cells[layer_idx], strict=True):
                buffer.bind_input(loop, name_in, cache_shape, first)
                buffer.bind_output(loop, name_out, cache_shape, first)
        rows.last_row.bind_input(loop, "seqlens_k", (shape[0],), row if is_step else 0)
        rows.total_length.bind_input(loop, "total_sequence_length", ())
        if state.loop_idx is not None:
            state.loop_idx.bind_input(loop, "loop_idx", ())
        if rows.exit_logit is not None:
            rows.exit_logit.bind_output(loop, "exit_logit", (*shape, 1), row)
        return Bound(session, loop, self._run_options(is_step and self.captured))

    def _head(self, rows: TokenRows, first: int, place: int, count: int) -> Bound:
        model, head = self._state.plan.shape, self._sessions.head.io_binding()
        rows.hidden.bind_input(head, "hidden", (count, 1, model.hidden_size), first * model.hidden_size)
        self._state.logits.bind_output(head, "logits", (count, 1, model.vocab_size), place * model.vocab_size)
        return Bound(self._sessions.head, head, self._run_options(False))

    def _device_head(self, rows: TokenRows, row: int, is_step: bool) -> Bound:
        model, head = self._state.plan.shape, self._sessions.head.io_binding()
        assert self._sampler is not None
        rows.hidden.bind_input(head, "hidden", (1, 1, model.hidden_size), row * model.hidden_size)
        self._sampler.logits.bind_output(head, "logits")
        return Bound(self._sessions.head, head, self._run_options(self.captured and is_step))

    def _run_options(self, captured: bool) -> ort.RunOptions | None:
        """Tells ONNX Runtime which captured graph a binding is, where graphs are captured."""
        if not self._sessions.replayed:
            return None
        options = ort.RunOptions()
        number = next(self._sessions.graph_ids) if captured else _NOT_CAPTURED
        options.add_run_config_entry("gpu_graph_id", str(number))
        return options
