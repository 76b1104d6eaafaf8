"""What ``melt plan`` draws: state against depth."""

import math
from dataclasses import replace
from pathlib import Path

from melt_plots import picture
from melt_runtime.bundle.contract import MAX_LOOPS
from melt_runtime.memory.estimate import MemoryPlan

_MOST_TICKS = 16


def plot_plan(plan: MemoryPlan, path: Path) -> None:
    """Draws state bytes against the number of loops, this bundle beside a cache per loop.

    Raises:
        ValueError: matplotlib is not installed.
    """
    depths = list(range(1, min(max(8, 2 * plan.state.loops), MAX_LOOPS) + 1))
    step = math.ceil(len(depths) / _MOST_TICKS)
    sizes = f"{plan.state.capacity} tokens, batch {plan.state.batch}, KV cache {plan.kv_cache_name}"
    with picture(path, f"State for {sizes}", width=7) as (_, axes):
        axis = axes[0, 0]
        lines = [(plan.per_loop, "a KV cache per loop, as in a LoopLM", "s--")]
        if plan.state.shape.cache_kind == "shared":
            lines.append((plan.state, "this bundle: one KV cache for all loops", "o-"))
        for state, label, style in lines:
            axis.plot(
                depths,
                [replace(state, loops=depth).total_bytes / 1e6 for depth in depths],
                style,
                label=label,
                markevery=step,
            )
        axis.set(xlabel="loops", ylabel="state, MB", ylim=(0, None), xticks=depths[::step])
        axis.legend(loc="upper left")
