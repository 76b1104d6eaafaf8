"""Torch against ONNX Runtime: after every loop of prefill and decode, tensor by tensor, over every kind of KV cache.

The bundle runs first, through the runtime's own driver. Then torch follows the same tokens: the reference of
``melt_models.modeling`` in float32 with the weights as the bundle rounded them, a sequence of a batch for each kind of
KV cache. Quantized matrices are run with unrounded activations here, so that the comparison is as close as at float32;
``melt_export.quality`` measures what rounding costs, activations included.

Over a quantized cache torch attends to the very rows that the bundle stored, after each of their codes was found to be
one that torch's own value rounds to: on the boundary between two codes either is right.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from melt_export.probe import random_ids
from melt_export.progress import bar
from melt_export.record import StepRecord, record_steps
from melt_export.tolerances import PARITY, Tolerance
from melt_export.variants import CODES, cache_codes, cache_scales, write_exact
from melt_layers import Frame
from melt_layers.layers import KeyValue
from melt_models.modeling import KVCache, MeltCausalLM
from melt_runtime.bundle.contract import KVCacheKind, loop_graph, prompt_graph
from melt_runtime.bundle.manifest import Manifest
from melt_runtime.bundle.measured import Difference, Parity, ParityRun
from melt_runtime.device.ort import ort
from melt_runtime.device.providers import choose_provider, make_session, session_options
from melt_runtime.errors import MeltError
from melt_runtime.execute.bindings import Sessions
from melt_runtime.loading.opening import open_sessions
from melt_runtime.memory.buffers import State
from melt_runtime.memory.plan import Array, plan_state
from melt_runtime.runner import LoopRunner

DECODE_STEPS = 32

# A large model is compared over fewer tokens: torch reads all of its weights at every loop of every step.
_BRIEF_CHUNK = 8
_BRIEF_STEPS = 3


class ParityError(MeltError):
    """ONNX Runtime and torch disagree; the message names the first tensor, loop and layer."""


def verify_bundle(
    folder: Path,
    manifest: Manifest,
    reference: MeltCausalLM,
    prompt: list[int] | None = None,
    brief: bool = False,
    prompts: bool = False,
) -> Parity:
    """Compares every loop graph of a bundle with its model, through every loop that it was trained with.

    Args:
        folder: the bundle.
        manifest: what it says of itself.
        reference: the model in float32, with the bundle's own weights.
        prompt: token ids, at least one chunk and a part of the next; default: random ones.
        brief: fewer tokens, for large models.
        prompts: compare the loops for passes of several rows, with any number of them; the reference has their weights.

    Raises:
        ParityError: a difference above the tolerance, or a greedy token that torch would clearly not choose.
    """
    config = reference.config
    loops = config.total_ut_steps
    chunk = min(config.chunk_size, _BRIEF_CHUNK) if brief else config.chunk_size
    count = _BRIEF_STEPS if brief else DECODE_STEPS
    prompt = random_ids(config, chunk, config.max_position_embeddings // 2) if prompt is None else prompt
    chunk = min(chunk, len(prompt))
    in_float32 = manifest.activations == "float32"  # else rounding of activations is what differs most
    exact = PARITY["quantized" if in_float32 and _is_quantized(manifest) else manifest.activations]
    lanes: list[_Lane] = []
    for kind in bar(manifest.kv_caches, "KV cache", "ONNX Runtime"):
        plan = plan_state(manifest, len(prompt) + count, chunk=chunk, kv_cache=kind)
        runner = LoopRunner(_exact_sessions(folder, manifest, kind, prompts), State(plan, "cpu"))
        decoded = [step.ids[0] for step in lanes[0].steps[-count:]] if lanes else None
        steps = record_steps(runner, prompt, loops, decoded, count)
        lanes.append(_Lane(kind, steps, cache_scales(folder, kind), exact))
    cache, start = KVCache(config), 0
    for place, step in enumerate(bar(lanes[0].steps, "step", "torch")):
        decode_idx = place - (len(lanes[0].steps) - count)
        phase = f"decode step {decode_idx}" if decode_idx >= 0 else f"prefill from token {start}"
        _follow(reference, lanes, place, cache, loops, phase)
        start += len(step.ids)
    return Parity(
        activations=manifest.activations,
        runs=tuple(lane.summary(loops, chunk, len(prompt), count) for lane in lanes),
    )


def _exact_sessions(folder: Path, manifest: Manifest, kind: KVCacheKind, prompts: bool) -> Sessions:
    """The bundle's graphs over one kind of KV cache; quantized matrices with unrounded activations."""
    provider = choose_provider("cpu", manifest.activations)
    if not _is_quantized(manifest):
        return open_sessions(folder, manifest, provider, kv_cache=kind)
    sessions = {"embed": make_session(folder / "embed.onnx", provider)}
    for role, name in (("loop", prompt_graph(kind) if prompts else loop_graph(kind)), ("head", "head")):
        exact = folder / f"{name}.exact.onnx"
        write_exact(folder / f"{name}.onnx", exact)
        options = session_options()
        if prompts:  # else every matrix would be unpacked to floats at once
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        sessions[role] = make_session(exact, provider, options=options)
        exact.unlink()
    return Sessions(**sessions)


def _is_quantized(manifest: Manifest) -> bool:
    return any(" block " in name for name in manifest.quantization.formats)


@dataclass
class _Lane:
    """One kind of KV cache: what the bundle gave over it, and how far torch was.

    Attributes:
        scales: of every layer's keys and values, each [Hk, dh] float32; empty over a float cache.
    """

    kind: KVCacheKind
    steps: list[StepRecord]
    scales: list[tuple[Array, Array]]
    tolerance: Tolerance
    tensors: dict[str, Difference] = field(default_factory=dict)
    hidden_by_loop: dict[str, float] = field(default_factory=dict)
    codes_seen: int = 0
    codes_equal: int = 0
    greedy_equal: int = 0

    def compare(self, name: str, actual: Array, expected: Tensor, place: str) -> float:
        """Records the difference of one tensor, raises where it is too large, and returns it over the magnitude."""
        wanted = expected.detach().double().numpy()
        return self._judge(name, np.abs(actual.astype(np.float64) - wanted), wanted, place)

    def compare_rows(self, name: str, stored: Array, expected: Tensor, scales: Array, place: str) -> Tensor:
        """Checks that every code is one that torch's value rounds to; the rows that the codes stand for.

        Args:
            name: ``key`` or ``value``.
            stored: [Hk, C, dh], at 4 bits packed.
            expected: torch's values, [Hk, C, dh].
            scales: [Hk, dh].
            place: for the message.
        """
        found = cache_codes(stored, self.kind)
        scale = scales[:, None].astype(np.float64)
        wanted = expected.detach().double().numpy()
        exact = np.clip(wanted / scale, *CODES[self.kind])
        # How far torch's value lies outside of what rounds to the code.
        self._judge(name, np.maximum(np.abs(exact - found) - 0.5, 0) * scale, wanted, place)
        self.codes_seen += found.size
        self.codes_equal += int((np.round(exact) == found).sum())
        return torch.from_numpy((found * scale).astype(np.float32))

    def token(self, step: int, actual: int, expected: Tensor) -> None:
        """Checks a greedy token: it is torch's, or torch had the two within twice the tolerance."""
        gap = float(expected.max() - expected[actual])
        limit = 2 * self.tolerance.allowed(expected.numpy())
        self.greedy_equal += actual == int(expected.argmax())
        if not gap <= limit:
            raise ParityError(
                f"greedy token {step} over the {self.kind} KV cache is {actual}, torch has {int(expected.argmax())}, "
                f"{gap:.3g} higher in logits (tolerance {limit:.3g})"
            )

    def summary(self, loops: int, chunk: int, prompt_tokens: int, decode_tokens: int) -> ParityRun:
        """What the manifest says of it."""
        return ParityRun(
            kv_cache=self.kind,
            loops=loops,
            chunk=chunk,
            prompt_tokens=prompt_tokens,
            decode_tokens=decode_tokens,
            greedy_tokens=len(self.steps),
            greedy_tokens_equal=self.greedy_equal,
            tensors=self.tensors,
            hidden_by_loop=self.hidden_by_loop,
            codes_equal=self.codes_equal / self.codes_seen if self.codes_seen else None,
        )

    def _judge(self, name: str, difference: Array, wanted: Array, place: str) -> float:
        error, magnitude = float(difference.max()), float(np.abs(wanted).max())
        found = Difference(error, magnitude, self.tolerance.allowed(wanted))
        # Written so that NaN fails too.
        if not found.error <= found.allowed:
            raise ParityError(
                f"ONNX Runtime and torch first differ in {name} at {place}, {self.kind} KV cache: largest difference "
                f"{error:.3g}, mean {float(difference.mean()):.3g}, allowed {found.allowed:.3g} of tensors up to "
                f"{magnitude:.3g}"
            )
        before = self.tensors.get(name)
        if before is None or found.error * before.allowed >= before.error * found.allowed:
            self.tensors[name] = found
        return error / magnitude if magnitude else 0.0


@torch.no_grad()
def _follow(reference: MeltCausalLM, lanes: list[_Lane], place: int, cache: KVCache, loops: int, phase: str) -> None:
    """Runs one step through torch, a sequence for each lane, and compares after every layer and loop."""
    ids = lanes[0].steps[place].ids
    with _watching(reference, lanes, place, phase):
        states = reference.model.forward_chunk(torch.tensor([ids] * len(lanes)), loops, cache)
    exit_gate = reference.model.early_exit_gate
    for loop_idx, hidden in enumerate(states):
        exits = None if exit_gate is None else exit_gate(hidden)
        for row, lane in enumerate(lanes):
            exit_logit = lane.steps[place].loops[loop_idx].exit_logit
            if exits is not None and exit_logit is not None:
                lane.compare("exit_logit", exit_logit, exits[row, :, 0], f"loop {loop_idx + 1} of {phase}")
    for lane, logits in zip(lanes, reference.lm_head(states[-1][:, -1]), strict=True):
        actual = lane.steps[place].logits
        lane.compare("logits", actual, logits, phase)
        lane.token(place, int(actual.argmax()), logits)


@contextmanager
def _watching(model: MeltCausalLM, lanes: list[_Lane], place: int, phase: str) -> Iterator[None]:
    """Compares latent states, rows and hidden states as torch computes them, and gives it the bundle's rounded rows."""
    seen = [0] * len(model.model.layers)

    def keys_values(layer_idx: int, attention: Any, h: Tensor, frame: Frame) -> KeyValue:
        loop_idx, at = seen[layer_idx], f"layer {layer_idx}, loop {seen[layer_idx] + 1} of {phase}"
        pair = type(attention).keys_values(attention, h, frame)
        for row, lane in enumerate(lanes):
            record = lane.steps[place].loops[loop_idx]
            if record.latents:
                lane.compare("latent", record.latents[layer_idx], h[row], at)
            for side, name in enumerate(("key", "value")):
                stored, wanted = record.rows[layer_idx][side], pair[side][row]
                if lane.scales:
                    pair[side][row] = lane.compare_rows(name, stored, wanted, lane.scales[layer_idx][side], at)
                else:
                    lane.compare(name, stored, wanted, at)
        seen[layer_idx] += 1
        return pair

    def closed(_: Any, __: Any, hidden: Tensor) -> None:
        name = str(seen[-1])
        for row, lane in enumerate(lanes):
            record = lane.steps[place].loops[seen[-1] - 1]
            error = lane.compare("hidden", record.hidden, hidden[row], f"loop {name} of {phase}")
            lane.hidden_by_loop[name] = max(error, lane.hidden_by_loop.get(name, 0.0))

    attentions = [layer.self_attn for layer in model.model.layers]
    for layer_idx, attention in enumerate(attentions):
        vars(attention)["keys_values"] = partial(keys_values, layer_idx, attention)
    handle = model.model.norm.register_forward_hook(closed)
    try:
        yield
    finally:
        handle.remove()
        for attention in attentions:
            del vars(attention)["keys_values"]
