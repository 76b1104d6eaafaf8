"""Runs a bundle through the runtime's own driver, in-place cache and all, and keeps what every loop left behind."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from melt_runtime.bundle.contract import KVCacheKind
from melt_runtime.bundle.manifest import Manifest
from melt_runtime.device.providers import choose_provider
from melt_runtime.loading.opening import open_sessions
from melt_runtime.memory.buffers import State
from melt_runtime.memory.plan import Array, plan_state
from melt_runtime.runner import LoopRunner


@dataclass(frozen=True)
class LoopRecord:
    """The state after one loop over C tokens.

    Attributes:
        hidden: [C, D] float.
        latents: of every layer, [C, D] float; empty where the gate has no latent state.
        rows: of every layer the tokens' keys and values as the cache holds them, each [Hk, C, dh], at 4 bits
            [Hk, C, dh / 2].
        exit_logit: [C] float; None where the model has no exit gate.
    """

    hidden: Array
    latents: list[Array]
    rows: list[tuple[Array, Array]]
    exit_logit: Array | None


@dataclass(frozen=True)
class StepRecord:
    """One chunk, or one decoded token: its ids, the state after each loop, the last token's logits [V] float32."""

    ids: list[int]
    loops: list[LoopRecord]
    logits: Array


def open_runner(
    folder: Path,
    manifest: Manifest,
    capacity: int,
    kv_cache: KVCacheKind = "float",
    chunk: int | None = None,
    prompts: bool = False,
) -> LoopRunner:
    """A driver over a bundle on the CPU, in chunks of its trained size where none is given.

    All passes run the bundle's own loop, or with ``prompts`` all that for passes of several rows.
    """
    if not prompts:
        manifest = replace(manifest, prompts=None)
    sessions = open_sessions(folder, manifest, choose_provider("cpu", manifest.activations), kv_cache=kv_cache)
    if sessions.prompts is not None:
        sessions = replace(sessions, loop=sessions.prompts)
    plan = plan_state(manifest, capacity, kv_cache=kv_cache, chunk=chunk)
    return LoopRunner(sessions, State(plan, "cpu"))


def record_steps(
    runner: LoopRunner, prompt: list[int], loops: int, decoded: Sequence[int] | None, count: int
) -> list[StepRecord]:
    """Runs a prompt in chunks, then single tokens.

    Args:
        runner: over an empty state of one sequence.
        prompt: token ids.
        loops: depth T.
        decoded: the tokens to decode; None: those of the highest logits.
        count: how many.
    """
    chunk = runner.state.plan.chunk
    steps = [_record(runner, prompt[start : start + chunk], loops) for start in range(0, len(prompt), chunk)]
    for place in range(count):
        token = int(steps[-1].logits.argmax()) if decoded is None else decoded[place]
        steps.append(_record(runner, [token], loops, decode=True))
    return steps


def _record(runner: LoopRunner, ids: list[int], loops: int, decode: bool = False) -> StepRecord:
    state = runner.state
    start = runner.slots[0].length
    found: list[LoopRecord] = []

    def keep(loop_idx: int) -> None:
        rows, flight = slice(start, start + len(ids)), runner.flight
        found.append(
            LoopRecord(
                flight.hidden,
                flight.latents,
                [
                    (keys.values()[0, :, rows].copy(), values.values()[0, :, rows].copy())
                    for keys, values in state.caches[state.plan.cache_set(loop_idx)]
                ],
                flight.exit_logits,
            )
        )

    logits = runner.decode(ids, loops, keep)[0] if decode else runner.prefill(ids, loops, observe=keep)
    return StepRecord(ids, found, logits.copy())
