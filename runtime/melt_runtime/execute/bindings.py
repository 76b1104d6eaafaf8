"""The graphs with their buffers, bound by address and kept by shape, so that a pass feeds no arrays."""

import itertools
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import onnxruntime as ort

from melt_runtime.bundle.contract import cache_names, latent_names
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


class Bindings:
    """Every way in which the graphs are bound to a state; ``first`` and ``count`` name neighbouring slots.

    Attributes:
        captured: whether the token of the only slot is captured as CUDA graphs. A chunk never is: its length changes.
    """

    def __init__(self, sessions: Sessions, state: State, sampler: DeviceSampler | None):
        self._sessions, self._state, self._sampler = sessions, state, sampler
        self.captured = sessions.replayed and state.plan.batch == 1
        self._kept: dict[str, OrderedDict[Hashable, Any]] = {}

    def embed_steps(self, first: int, count: int) -> Bound:
        """Token ids of slots to their hidden states; of all slots to their latent states too."""
        is_all = (first, count) == (0, self._state.plan.batch)
        return self._keep(
            "embed", (first, count), lambda: self._embed(self._state.step, (count, 1), first, is_all, self.captured)
        )

    def steps(self, first: int, count: int) -> list[Bound]:
        """One loop over a token of each of some slots, for each cache set."""
        return self._keep(
            "steps", (first, count), lambda: self._loops(self._state.step, (count, 1), first, first, self.captured)
        )

    def step_head(self, first: int, count: int) -> Bound:
        """Their hidden states to logits on the host."""
        return self._keep("head", (first, count), lambda: self._head(self._state.step, first, first, count))

    def embed_chunk(self, tokens: int) -> Bound:
        """A chunk's ids to the state before its first loop."""
        return self._keep("embed chunk", tokens, lambda: self._embed(self._state.chunk, (1, tokens), 0, True, False))

    def chunk(self, tokens: int, slot: int) -> list[Bound]:
        """One loop over a chunk of a slot, for each cache set."""
        return self._keep("chunk", (tokens, slot), lambda: self._loops(self._state.chunk, (1, tokens), 0, slot, False))

    def wave(self, base: int, tokens: int, slot: int) -> list[Bound]:
        """One loop over consecutive tokens of a slot that lie among a chunk's rows from ``base`` on."""
        plan = self._state.plan
        return self._keep(
            "wave",
            (base, tokens, slot),
            lambda: self._loops(self._state.chunk, (1, tokens), base, slot, False, stride=plan.chunk),
        )

    def wave_embed(self, row: int) -> Bound:
        """A token id to its hidden state there; its latent states are the caller's to clear."""
        return self._keep("wave embed", row, lambda: self._embed(self._state.chunk, (1, 1), row, False, False))

    def wave_head(self, base: int, tokens: int) -> Bound:
        """Hidden states of a wave to logits, from the first row of those on."""
        return self._keep("wave head", (base, tokens), lambda: self._head(self._state.chunk, base, 0, tokens))

    def chunk_head(self, tokens: int, slot: int) -> Bound:
        """The hidden state of a chunk's last token to the slot's logits on the host."""
        return self._keep("chunk head", (tokens, slot), lambda: self._head(self._state.chunk, tokens - 1, slot, 1))

    def device_head(self, rows: TokenRows, row: int) -> Bound:
        """One hidden state to the logits on the device, for the sampler there."""
        is_step = rows is self._state.step
        return self._keep("device head", (is_step, row), lambda: self._device_head(rows, row, is_step))

    def _keep(self, kind: str, key: Hashable, make: Callable[[], T]) -> T:
        """What was made for ``key``, kept while it is among those used last."""
        kept = self._kept.setdefault(kind, OrderedDict())
        if key in kept:
            kept.move_to_end(key)
        else:
            kept[key] = make()
            if len(kept) > _KEPT:
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

    def _loops(
        self, rows: TokenRows, shape: tuple[int, int], first: int, slot: int, captured: bool, stride: int | None = None
    ) -> list[Bound]:
        if stride is None:
            # Between layers lie the rows of every slot, or of this chunk alone.
            stride = self._state.plan.batch if rows is self._state.step else shape[1]
        cache_sets = range(self._state.plan.cache_sets)
        return [self._loop(rows, shape, first, slot, stride, cache_set, captured) for cache_set in cache_sets]

    def _loop(
        self,
        rows: TokenRows,
        shape: tuple[int, int],
        first: int,
        slot: int,
        stride: int,
        cache_set: int,
        captured: bool,
    ) -> Bound:
        """Binds one loop in place, each output to the buffer of its input.

        Args:
            rows: where the tokens in flight lie.
            shape: [B, C].
            first: the first of these rows.
            slot: the first of the slots.
            stride: rows from one layer's latent states to the next one's.
            cache_set: which KV cache.
            captured: whether it becomes a CUDA graph.
        """
        state, model = self._state, self._state.plan.shape
        hidden = (*shape, model.hidden_size)
        loop = self._sessions.loop.io_binding()
        rows.hidden.bind_input(loop, "hidden", hidden, first * model.hidden_size)
        rows.hidden.bind_output(loop, "hidden_out", hidden, first * model.hidden_size)
        cache_shape = (shape[0], *state.plan.cache_shape[1:])
        first_row = slot * int(np.prod(cache_shape[1:]))
        for layer_idx in range(model.layers):
            if rows.latent is not None:
                name_in, name_out = latent_names(layer_idx)
                offset = (layer_idx * stride + first) * model.hidden_size
                rows.latent.bind_input(loop, name_in, hidden, offset)
                rows.latent.bind_output(loop, name_out, hidden, offset)
            pairs = zip(cache_names(layer_idx), state.caches[cache_set][layer_idx], strict=True)
            for (name_in, name_out), buffer in pairs:
                buffer.bind_input(loop, name_in, cache_shape, first_row)
                buffer.bind_output(loop, name_out, cache_shape, first_row)
        rows.last_row.bind_input(loop, "seqlens_k", (shape[0],), first if rows is state.step else 0)
        rows.total_length.bind_input(loop, "total_sequence_length", ())
        if state.loop_idx is not None:
            state.loop_idx.bind_input(loop, "loop_idx", ())
        if rows.exit_logit is not None:
            rows.exit_logit.bind_output(loop, "exit_logit", (*shape, 1), first)
        return Bound(self._sessions.loop, loop, self._run_options(captured))

    def _head(self, rows: TokenRows, first: int, slot: int, count: int) -> Bound:
        model, head = self._state.plan.shape, self._sessions.head.io_binding()
        rows.hidden.bind_input(head, "hidden", (count, 1, model.hidden_size), first * model.hidden_size)
        self._state.logits.bind_output(head, "logits", (count, 1, model.vocab_size), slot * model.vocab_size)
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
