"""What a model takes in memory, before anything is allocated: weights and state exactly, the rest of the process about.

MELT stands beside a KV cache for each loop, as a LoopLM has it.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from melt_runtime.contract import KVCacheKind
from melt_runtime.manifest import Manifest
from melt_runtime.model import plan_state
from melt_runtime.state import StatePlan

OPENING_BYTES = 40_000_000
"""What opening sessions and a tokenizer adds to a process: 28 to 48 MiB where it was measured (docs/performance.md)."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes for one choice of sizes.

    Attributes:
        weight_bytes: weights of the three graphs.
        state: the state that this bundle allocates.
        per_loop: the state if every loop had a KV cache of its own, as in a LoopLM.
        program_bytes: Python, its libraries and the open sessions, about: what this process takes now, which has
            loaded them, and ``OPENING_BYTES``.
    """

    weight_bytes: int
    state: StatePlan
    per_loop: StatePlan
    program_bytes: int

    @property
    def total_bytes(self) -> int:
        """Weights and state."""
        return self.weight_bytes + self.state.total_bytes

    @property
    def process_bytes(self) -> int:
        """Peak resident memory of a process that fills its capacity, on the CPU, about."""
        return self.total_bytes + self.program_bytes + self.state.activation_bytes

    @property
    def cache_bytes_per_token(self) -> int:
        """Bytes of keys and values that one more token of capacity costs."""
        return self.state.cache_bytes // (self.state.batch * self.state.capacity)


def plan_memory(
    manifest: Manifest,
    capacity: int | None = None,
    batch: int = 1,
    loops: int | None = None,
    kv_cache: KVCacheKind = "float",
    chunk: int | None = None,
) -> MemoryPlan:
    """Computes the plan for a bundle.

    Args:
        manifest: of the bundle.
        capacity: tokens that the cache holds.
        batch: sequences.
        loops: depth.
        kv_cache: how keys and values are stored.
        chunk: tokens in parallel in prefill; defaults are those of ``MeltModel.load``.

    Raises:
        ValueError: a size outside its rule.
    """
    state = plan_state(manifest, capacity, batch=batch, chunk=chunk, loops=loops, kv_cache=kv_cache)
    return MemoryPlan(manifest.weight_bytes, state, state.as_per_loop(), current_bytes() + OPENING_BYTES)


def format_bytes(count: int) -> str:
    """Bytes for people, in decimal units: ``12.58 MB``."""
    amount, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while amount >= 1000 and len(units) > 1:
        amount /= 1000
        units.pop(0)
    return f"{count} B" if units[0] == "B" else f"{amount:.2f} {units[0]}"


def format_plan(plan: MemoryPlan) -> str:
    """The plan as a table."""
    state = plan.state
    more = plan.per_loop.total_bytes - state.total_bytes
    sizes = f"capacity {state.capacity} tokens, batch {state.batch}, loops {state.loops}, KV cache {state.cache_dtype}"
    rows = (
        ("weights", plan.weight_bytes, plan.weight_bytes),
        ("KV cache", state.cache_bytes, plan.per_loop.cache_bytes),
        ("other state", state.work_bytes, plan.per_loop.work_bytes),
        ("total", plan.total_bytes, plan.total_bytes + more),
        ("program", plan.program_bytes, plan.program_bytes),
        ("activations", state.activation_bytes, state.activation_bytes),
        ("process", plan.process_bytes, plan.process_bytes + more),
    )
    lines = [sizes, f"{'':<12} {'this bundle':>16} {'a cache per loop':>18}"]
    lines += [f"{name:<12} {format_bytes(ours):>16} {format_bytes(theirs):>18}" for name, ours, theirs in rows]
    lines.append(f"total is exact; program, activations (chunks of {state.chunk}) and process are estimates for a CPU")
    return "\n".join(lines)


def plot_plan(plan: MemoryPlan, path: Path) -> None:
    """Draws state bytes against the number of loops, this bundle beside a cache per loop.

    Raises:
        ValueError: matplotlib is not installed.
    """
    depths = list(range(1, max(8, 2 * plan.state.loops) + 1))
    figure = new_figure(7, 4)
    axes = figure.add_subplot()
    for state, label, style in (
        (plan.per_loop, "a KV cache per loop (LoopLM)", "s--"),
        (plan.state, f"this bundle ({plan.state.shape.cache_kind} cache)", "o-"),
    ):
        axes.plot(depths, [replace(state, loops=depth).total_bytes / 1e6 for depth in depths], style, label=label)
    axes.set(xlabel="loops", ylabel="state, MB", ylim=(0, None))
    axes.set_title(
        f"State for {plan.state.capacity} tokens, batch {plan.state.batch}, KV cache {plan.state.cache_dtype}"
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib figure, sizes in inches.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("--plot needs matplotlib: pip install 'melt-onnx[plot]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def resident_bytes() -> int:
    """Peak resident memory of this process; 0 where the system does not say (Windows)."""
    found = _status("VmHWM:")  # Linux; getrusage counts what the parent held when it started this process
    if found is not None:
        return found
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def current_bytes() -> int:
    """Resident memory of this process now; where the system does not say, its peak."""
    return _status("VmRSS:") or resident_bytes()


def _status(name: str) -> int | None:
    """Bytes by their name in Linux's description of this process."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))
    except (OSError, StopIteration):
        return None
