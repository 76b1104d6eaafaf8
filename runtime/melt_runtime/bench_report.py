"""What a benchmark found, as a table and as a picture."""

from itertools import groupby
from pathlib import Path

from melt_runtime.bench import Row
from melt_runtime.memory import format_bytes
from melt_runtime.plots import new_figure

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


def plot_rows(rows: list[Row], path: Path) -> None:
    """Draws decoding speed and state against loops and against position, each bundle beside a KV cache per loop.

    Raises:
        ValueError: matplotlib is not installed.
    """
    decoded = [row for row in rows if row.kind == "decode" and row.batch == min(r.batch for r in rows)]
    figure = new_figure(11, 7)
    axes = figure.subplots(2, 2)
    deepest, furthest = max(row.loops for row in decoded), max(row.tokens for row in decoded)
    for column, key, fixed in ((0, "loops", furthest), (1, "tokens", deepest)):
        chosen = [row for row in decoded if (row.tokens if key == "loops" else row.loops) == fixed]
        where = f"at position {fixed}" if key == "loops" else f"with {fixed} loops"
        chosen.sort(key=lambda row: (row.bundle, row.kv_cache, getattr(row, key)))
        for (bundle, kv_cache), group in groupby(chosen, key=lambda row: (row.bundle, row.kv_cache)):
            line = list(group)
            label, places = f"{bundle}, {kv_cache} cache", [getattr(row, key) for row in line]
            axes[0][column].plot(places, [1e3 * row.seconds for row in line], "o-", label=label)
            (drawn,) = axes[1][column].plot(places, [row.state_bytes / 1e6 for row in line], "o-", label=label)
            per_loop = [row.per_loop_bytes / 1e6 for row in line]
            axes[1][column].plot(places, per_loop, "s--", color=drawn.get_color(), label=f"{label} per loop", alpha=0.6)
        axes[0][column].set(title=f"Decoding {where}", ylabel="ms a token")
        axes[1][column].set(title=f"State {where}", ylabel="MB")
        for axis in (axes[0][column], axes[1][column]):
            axis.set(xlabel="loops" if key == "loops" else "tokens in the cache", ylim=(0, None))
            if key == "loops":
                axis.set_xticks(sorted({row.loops for row in chosen}))
            axis.grid(alpha=0.3)
            axis.legend(fontsize=8)
    figure.savefig(path, dpi=130)
