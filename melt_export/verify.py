"""Torch against ONNX Runtime: after every loop of prefill and decode, tensor by tensor, then the greedy tokens.

The bundle runs through the runtime's own driver, in-place cache and all; torch is the reference of
``melt_models.modeling`` in float32, with the weights as the bundle rounded them. Quantized matrices are run with
unrounded activations here, so that the comparison is as close as at float32; what the rounding costs is measured by
``melt_export.quality``.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from melt_export.probe import random_ids
from melt_export.variants import write_exact
from melt_layers import Layer
from melt_models.modeling import KVCache, MeltCausalLM
from melt_runtime.errors import MeltError
from melt_runtime.loop import LoopRunner, Sessions
from melt_runtime.manifest import Manifest
from melt_runtime.opening import open_sessions
from melt_runtime.plan import plan_state
from melt_runtime.providers import choose_provider, make_session
from melt_runtime.state import Array, State

TOLERANCES = {"float32": 1e-4, "float16": 4e-2, "quantized": 5e-4}
"""Largest difference allowed, as a fraction of the tensor's largest magnitude where that exceeds 1: by activation type,
and for quantized weights, whose products are summed block by block. Over 4 loops float16 activations reach 2 % of a
key; over 30 layers of a language model quantized weights reached 1.1e-4 of one."""

DECODE_STEPS = 32

# A large model is compared over less: torch reads all of its weights at every loop of every step.
_BRIEF_LOOPS = 2
_BRIEF_CHUNK = 8
_BRIEF_STEPS = 1


class ParityError(MeltError):
    """ONNX Runtime and torch disagree; the message names the first tensor, loop and layer."""


@dataclass
class _LayerTrace:
    """What one layer gave at every loop of a forward pass: latent [C, D], keys and values [Hk, P + C, dh]."""

    latents: list[Tensor] = field(default_factory=list)
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)


def verify_bundle(
    folder: Path, manifest: Manifest, reference: MeltCausalLM, prompt: list[int] | None = None, brief: bool = False
) -> dict[str, Any]:
    """Compares a bundle with its model and returns the report for the manifest.

    Args:
        folder: the bundle.
        manifest: what it says of itself.
        reference: the model in float32, with the bundle's own weights.
        prompt: token ids, at least one chunk and a part of the next; default: random ones.
        brief: fewer tokens and loops, for large models.

    Raises:
        ParityError: a difference above the tolerance, or a greedy token that torch would clearly not choose.
    """
    config = reference.config
    loops = min(config.total_ut_steps, _BRIEF_LOOPS) if brief else config.total_ut_steps
    chunk = min(config.chunk_size, _BRIEF_CHUNK) if brief else config.chunk_size
    steps = _BRIEF_STEPS if brief else DECODE_STEPS
    prompt = random_ids(config, chunk, config.max_position_embeddings // 2) if prompt is None else prompt
    plan = plan_state(manifest, len(prompt) + steps, chunk=chunk)
    runner = LoopRunner(_exact_sessions(folder, manifest), State(plan, "cpu"))
    exact = TOLERANCES[manifest.activations]
    check = _Comparison(max(exact, TOLERANCES["quantized"]) if _is_quantized(manifest) else exact)
    cache = KVCache(reference.config)
    logits, expected = np.empty(0), torch.empty(0)
    for start in range(0, len(prompt), chunk):
        ids = prompt[start : start + chunk]
        logits, expected = check.step(reference, runner, cache, ids, loops, f"prefill from token {start}")
    equal = 0
    for step in range(steps):
        token = int(expected.argmax())
        check.token(step, int(logits.argmax()), expected)
        equal += int(logits.argmax()) == token
        logits, expected = check.step(reference, runner, cache, [token], loops, f"decode step {step}")
    return {
        "tolerance": check.tolerance,
        "loops": loops,
        "chunk": chunk,
        "prompt_tokens": len(prompt),
        "decode_tokens": steps,
        "greedy_tokens_equal": equal,
        "max_abs_error": check.worst,
        "max_abs_error_of_hidden_by_loop": check.hidden_by_loop,
    }


def _exact_sessions(folder: Path, manifest: Manifest) -> Sessions:
    """The bundle's graphs; quantized ones with unrounded activations."""
    provider = choose_provider("cpu", manifest.activations)
    if not _is_quantized(manifest):
        return open_sessions(folder, manifest, provider)
    sessions = {"embed": make_session(folder / "embed.onnx", provider)}
    for name in ("loop", "head"):
        exact = folder / f"{name}.exact.onnx"
        write_exact(folder / f"{name}.onnx", exact)
        sessions[name] = make_session(exact, provider)
        exact.unlink()
    return Sessions(**sessions)


def _is_quantized(manifest: Manifest) -> bool:
    return any(" block " in name for name in manifest.quantization.formats)


class _Comparison:
    """Compares step by step and keeps the largest differences."""

    def __init__(self, tolerance: float):
        self.tolerance = tolerance
        self.worst: dict[str, float] = {}
        self.hidden_by_loop: dict[str, float] = {}

    @torch.no_grad()
    def step(
        self,
        reference: MeltCausalLM,
        runner: LoopRunner,
        cache: KVCache,
        ids: list[int],
        loops: int,
        phase: str,
    ) -> tuple[Array, Tensor]:
        """Runs one chunk through both and compares after every loop; returns both logits of the last token, [V]."""
        start, state = cache.length, runner.state
        with _recording(reference) as traces:
            states = reference.model.forward_chunk(torch.tensor([ids]), loops, cache)
        width, rows = reference.config.hidden_size, slice(start, start + len(ids))

        def compare(loop_idx: int) -> None:
            place = f"loop {loop_idx + 1} of {phase}"
            layers = state.caches[state.plan.cache_set(loop_idx)]
            # A chunk's latents stand packed from the start of the buffer.
            latents = state.latent.read().reshape(-1) if state.latent is not None else None
            size = len(ids) * width
            for layer_idx, trace in enumerate(traces):
                at = f"layer {layer_idx}, {place}"
                if latents is not None:
                    actual = latents[layer_idx * size : (layer_idx + 1) * size].reshape(len(ids), width)
                    self.compare("latent", actual, trace.latents[loop_idx], at)
                keys, values = layers[layer_idx]
                self.compare("key", keys.read()[0, :, rows], trace.keys[loop_idx][:, rows], at)
                self.compare("value", values.read()[0, :, rows], trace.values[loop_idx][:, rows], at)
            hidden = states[loop_idx][0]
            actual_hidden = state.hidden.read().reshape(-1)[:size].reshape(len(ids), width)
            error = self.compare("hidden", actual_hidden, hidden, place)
            name = str(loop_idx + 1)
            self.hidden_by_loop[name] = max(error, self.hidden_by_loop.get(name, 0.0))
            exit_gate = reference.model.early_exit_gate
            if exit_gate is not None and state.exit_logit is not None:
                self.compare("exit_logit", state.exit_logit.read()[: len(ids)], exit_gate(hidden)[:, 0], place)

        if len(ids) == 1:
            actual_logits = runner.decode(ids, loops, observe=compare)[0]
        else:
            actual_logits = runner.prefill(ids, loops, observe=compare)
        expected = reference.lm_head(states[-1][0, -1])
        self.compare("logits", actual_logits, expected, phase)
        return actual_logits, expected

    def compare(self, name: str, actual: Array, expected: Tensor, place: str) -> float:
        """Records the difference of one tensor and raises where it is too large."""
        wanted = expected.detach().double().numpy()
        difference = np.abs(actual.astype(np.float64) - wanted)
        error, scale = float(difference.max()), max(1.0, float(np.abs(wanted).max()))
        # Written so that NaN fails too.
        if not error <= self.tolerance * scale:
            raise ParityError(
                f"ONNX Runtime and torch first differ in {name} at {place}: largest difference {error:.3g}, mean "
                f"{float(difference.mean()):.3g}, tolerance {self.tolerance * scale:.3g}"
            )
        self.worst[name] = max(error, self.worst.get(name, 0.0))
        return error

    def token(self, step: int, actual: int, expected: Tensor) -> None:
        """Checks a greedy token: it is torch's, or torch had the two within twice the tolerance."""
        gap = float(expected.max() - expected[actual])
        limit = 2 * self.tolerance * max(1.0, float(expected.abs().max()))
        if gap > limit:
            raise ParityError(
                f"greedy token {step} is {actual}, torch has {int(expected.argmax())}, {gap:.3g} higher in logits "
                f"(tolerance {limit:.3g})"
            )


@contextmanager
def _recording(model: MeltCausalLM) -> Iterator[list[_LayerTrace]]:
    """Collects what every layer gives while the context lasts."""
    traces = [_LayerTrace() for _ in model.model.layers]

    def hook(trace: _LayerTrace) -> Any:
        def record(module: Layer, args: tuple, output: tuple) -> None:
            _, latent, (keys, values) = output
            trace.latents.append(latent[0])
            trace.keys.append(keys[0])
            trace.values.append(values[0])

        return record

    handles = [
        layer.register_forward_hook(hook(trace)) for layer, trace in zip(model.model.layers, traces, strict=True)
    ]
    try:
        yield traces
    finally:
        for handle in handles:
            handle.remove()
