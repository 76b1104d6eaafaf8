"""Pictures: what ``melt plan`` draws, and the empty figure that every picture begins with."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from melt_runtime.memory import MemoryPlan


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
