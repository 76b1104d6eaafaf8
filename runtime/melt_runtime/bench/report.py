"""What a benchmark found, as a table and as a picture."""

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from melt_plots import picture
from melt_runtime.bench.measure import Row
from melt_runtime.bundle.contract import KV_CACHES
from melt_runtime.memory.estimate import format_bytes

_KINDS: list[str] = list(KV_CACHES)

_COLUMNS = (
    "bundle",
    "what",
    "KV cache",
    "loops",
    "tokens",
    "batch",
    "ms",
    "tokens/s",
    "ms/loop",
    "of bandwidth",
    "state",
    "peak",
    "load s",
)


def format_header() -> str:
    """The first two lines of the table, in Markdown."""
    return f"| {' | '.join(_COLUMNS)} |\n{'|---' * len(_COLUMNS)}|"


def format_row(row: Row, bandwidth: float) -> str:
    """One line of the table.

    Args:
        row: the measurement.
        bandwidth: bytes a second that a plain loop reads; the share of decoding is given in percent.
    """
    share = f"{100 * row.bandwidth / bandwidth:.0f} %" if row.kind == "decode" else ""
    cells = (
        row.bundle,
        row.kind,
        row.kv_cache,
        str(row.loops),
        str(row.tokens),
        str(row.batch),
        f"{1e3 * row.seconds:.1f}",
        f"{row.tokens_per_second:.1f}",
        f"{1e3 * row.loop_seconds:.2f}",
        share,
        format_bytes(row.state_bytes),
        format_bytes(row.peak_bytes),
        f"{row.load_seconds:.2f}",
    )
    return f"| {' | '.join(cells)} |"


def plot_rows(rows: Sequence[Row], path: Path) -> None:
    """Draws decoding speed and state against whatever was varied, loops or position.

    Raises:
        ValueError: matplotlib is not installed, or no decoded token was measured.
    """
    batch = min((row.batch for row in rows), default=1)
    decoded = [row for row in rows if row.kind == "decode" and row.batch == batch]
    if not decoded:
        raise ValueError("nothing to draw: --plot shows decoding, and no decoded token was measured")
    keys = [key for key in ("loops", "tokens") if len({getattr(row, key) for row in decoded}) > 1] or ["loops"]
    title = "Decoding and its state, by " + " and ".join("position" if key == "tokens" else key for key in keys)
    lines = len({(row.bundle, row.kv_cache) for row in decoded})
    height = 3.6 * len(keys) + 0.3 * lines
    with picture(path, title, len(keys), 2, width=11, height=height) as (figure, axes):
        for panels, key in zip(axes, keys, strict=True):
            _plot_panels(panels, decoded, key)
        figure.legend(*axes[0, 1].get_legend_handles_labels(), loc="outside lower left", ncols=2)


def _plot_panels(axes: Any, rows: Sequence[Row], key: str) -> None:
    """Milliseconds left, state right, against ``key``; what was not varied stands in the titles."""
    other = "tokens" if key == "loops" else "loops"
    fixed = max(getattr(row, other) for row in rows)
    where = f"at position {fixed:,}" if key == "loops" else f"with {fixed} loops"
    chosen = sorted(
        (row for row in rows if getattr(row, other) == fixed),
        key=lambda row: (row.bundle, _KINDS.index(row.kv_cache), getattr(row, key)),
    )
    for (bundle, kv_cache), group in groupby(chosen, key=lambda row: (row.bundle, row.kv_cache)):
        line = list(group)
        places = [getattr(row, key) for row in line]
        label = f"{bundle}, {kv_cache} KV cache"
        (drawn,) = axes[0].plot(places, [1e3 * row.seconds for row in line], "o-")
        axes[1].plot(places, [row.state_bytes / 1e6 for row in line], "o-", color=drawn.get_color(), label=label)
        # Kinds of KV cache beside each other would cover one another's lines.
        is_shared = line[-1].per_loop_bytes > line[-1].state_bytes
        if is_shared and len({row.kv_cache for row in chosen}) == 1:
            per_loop = [row.per_loop_bytes / 1e6 for row in line]
            label = f"{bundle}, if every loop had a KV cache"
            axes[1].plot(places, per_loop, "s--", color=drawn.get_color(), alpha=0.5, label=label)
    axes[0].set(title=f"Decoding {where}", ylabel="ms a token")
    axes[1].set(title=f"State {where}", ylabel="MB")
    for axis in axes:
        axis.set(xlabel="loops" if key == "loops" else "tokens in the cache", ylim=(0, None))
        axis.yaxis.set_major_formatter("{x:,.0f}")
        if key == "loops":
            axis.set_xticks(sorted({row.loops for row in chosen}))
        else:
            axis.xaxis.set_major_formatter("{x:,.0f}")
