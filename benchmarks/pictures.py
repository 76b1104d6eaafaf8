"""Draws every picture of the documents again, from what was measured and stands in ``docs/data``.

    python benchmarks/pictures.py

Each file there is written by the command that measures it: ``melt bench --json`` (``bench-full.json``,
``bench-kv.json``), and by ``--json`` of ``benchmarks/memory.py``, ``training.py``, ``batches.py``, ``decoding.py``,
``serving.py``, ``answers.py``, ``text.py`` and ``training_code.py``.
"""

import json
import sys
from pathlib import Path
from typing import Any

from melt_plots import picture
from melt_runtime.bench.measure import Row
from melt_runtime.bench.report import plot_rows

DOCS = Path(__file__).parent.parent / "docs"
NAMES = {"melt-1.6b-int4": "MELT-1.6B", "ouro-1.4b-int4": "Ouro-1.4B"}
AT = 8000
"""Tokens of context at which memory is drawn by loops."""


def read(name: str) -> Any:
    """What was measured."""
    return json.loads((DOCS / "data" / name).read_text(encoding="utf-8"))


def draw_memory(points: list[dict[str, Any]], path: Path) -> None:
    """Peak memory of whole processes: by context, a line for each depth that differs, and by loops."""
    title = "MELT: memory does not grow with depth (whole processes, 4-bit weights, int8 KV cache)"
    with picture(path, title, 1, 2, width=10, height=4.2) as (_, axes):
        by_context, by_loops = axes[0]
        for colour, (bundle, name) in enumerate(NAMES.items()):
            own = [point for point in points if point["bundle"] == bundle]
            longest = max(point["context"] for point in own)
            ends = {p["loops"]: p["peak"] / 1e9 for p in own if p["context"] == longest}
            is_flat = max(ends.values()) < 1.02 * min(ends.values())
            for loops, end in list(ends.items())[-1:] if is_flat else ends.items():
                line = [(p["context"], p["peak"] / 1e9) for p in own if p["loops"] == loops]
                by_context.plot(*zip(*line, strict=True), "o-", color=f"C{colour}", alpha=0.4 + 0.07 * loops)
                depth = f"{min(ends)} to {max(ends)} loops" if is_flat else f"{loops} loop{'s' * (loops > 1)}"
                # Where two lines end at the same height, one label stands above and one below.
                shift = 7 if is_flat else -7 if loops == 1 else 0
                by_context.annotate(
                    f"{name}, {depth}", (longest, end), (6, shift), textcoords="offset points", va="center", fontsize=9
                )
            line = [(p["loops"], p["peak"] / 1e9, p["plan"] / 1e9) for p in own if p["context"] == AT]
            places, peaks, plans = zip(*line, strict=True)
            by_loops.plot(places, peaks, "o-", color=f"C{colour}", label=f"{name}, measured")
            by_loops.plot(places, plans, "x", color="black", zorder=3)
        by_context.set(title="by context", xlabel="tokens", ylabel="peak resident memory, GB", ylim=(0, None))
        by_context.set_xlim(0, 1.55 * longest)
        by_context.set_xticks([0, 4000, 8000, 16000])
        by_context.xaxis.set_major_formatter("{x:,.0f}")
        by_loops.set(title=f"by loops, at {AT:,} tokens", xlabel="loops", ylim=(0, None), xticks=places)
        by_loops.plot([], [], "x", color="black", label="as melt plan said before")
        by_loops.legend(loc="upper left")


def draw_runs(runs: list[dict[str, Any]], path: Path) -> None:
    """Exact match of the teacher, of MELT, of other gates and of recipes with a part left out."""
    title = "melt-tiny's task: exact match at 4 loops, in chunks of 64"
    with picture(path, title, width=8, height=4) as (_, axes):
        axis, places = axes[0, 0], list(range(len(runs)))[::-1]
        colours = ["C6" if run["title"].startswith("teacher") else "C0" for run in runs]
        spreads = [run["spread"] or 0 for run in runs]
        axis.barh(places, [run["mean"] for run in runs], xerr=spreads, color=colours, height=0.65)
        for place, run in zip(places, runs, strict=True):
            spread = f" ± {run['spread']:.1f} ({run['seeds']} seeds)" if run["spread"] is not None else ""
            axis.text(1.5, place, f"{run['mean']:.1f}{spread}", va="center", color="white", fontsize=9)
        axis.set_yticks(places, [run["title"] for run in runs])
        axis.set(xlabel="exact match, %", xlim=(0, 103))
        axis.grid(visible=False, axis="y")


def draw_depths(accuracy: dict[str, dict[str, dict[str, float]]], path: Path) -> None:
    """Exact match by loops and hops, as shaded tables, teacher beside MELT."""
    title = "One loop more answers one hop more: exact match, %"
    with picture(path, title, 1, 2, width=8, height=3.2, sharey=True) as (_, axes):
        for axis, (name, by_loops) in zip(axes[0], accuracy.items(), strict=True):
            depths, hops = list(by_loops), list(by_loops["1"])
            cells = [[by_loops[depth][hop] for depth in depths] for hop in hops]
            axis.imshow(cells, cmap="Blues", vmin=0, vmax=130, aspect="auto")
            for row, values in enumerate(cells):
                for column, value in enumerate(values):
                    colour = "white" if value > 60 else "#222222"
                    axis.text(column, row, f"{value:.1f}", ha="center", va="center", color=colour)
            axis.set_xticks(range(len(depths)), depths)
            axis.set_yticks(range(len(hops)), [f"{hop} hop{'s' * (hop != '1')}" for hop in hops])
            axis.set(title=name, xlabel="loops")
            axis.grid(visible=False)
            axis.tick_params(length=0)


def draw_batches(rows: list[dict[str, Any]], path: Path) -> None:
    """Tokens a second of all sequences together, beside one alone, by how many share a pass; a panel a position."""
    rows = [row for row in rows if row["bundle"] != "melt-tiny"]
    positions = sorted({row["position"] for row in rows})
    title = "Sequences that share a pass: tokens a second beside one alone (4 layers, 4 loops)"
    with picture(path, title, 1, len(positions), width=9, height=4, sharey=True) as (figure, axes):
        for axis, position in zip(axes[0], positions, strict=True):
            for bundle in sorted({row["bundle"] for row in rows}):
                line = [(r["batch"], r["ratio"]) for r in rows if (r["bundle"], r["position"]) == (bundle, position)]
                axis.plot(*zip(*line, strict=True), "o-", label=bundle.replace("-4-", ", "))
            axis.set(title=f"at position {position:,}", xlabel="sequences", xticks=[1, 2, 4, 8, 16], ylim=(0, None))
        axes[0, 0].set_ylabel("times the tokens of one")
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower left", ncols=4)


def draw_waves(rows: list[dict[str, Any]], path: Path) -> None:
    """Tokens a second of a wave of lag 1 beside plain decoding, by the share of drafts that hold; a panel a depth."""
    title = "Waves of lag 1 beside plain decoding, 4 loops"
    depths = {
        "24 layers": [r for r in rows if "-4-" not in r["bundle"]],
        "4 layers": [r for r in rows if "-4-" in r["bundle"]],
    }
    with picture(path, title, 1, 2, width=9, height=4, sharey=True) as (_, axes):
        for axis, (name, own) in zip(axes[0], depths.items(), strict=True):
            cases = sorted({(row["bundle"], row["position"]) for row in own})
            for bundle, position in cases:
                line = [
                    (int(row["way"].split(", ")[2].split("%")[0]), row["ratio"])
                    for row in own
                    if (row["bundle"], row["position"]) == (bundle, position)
                    and row["way"].startswith("wave, lag 1")
                    and not row["way"].endswith("early")
                ]
                label = f"{bundle.replace('-4-', '-')}, position {position:,}"
                axis.plot(*zip(*line, strict=True), "o-" if position < 1000 else "s--", label=label)
            axis.axhline(1, color="#888888", linewidth=1)
            axis.set(title=name, xlabel="drafts that hold, %", ylim=(0, None))
            axis.legend(loc="upper left", fontsize=8)
        axes[0, 0].set_ylabel("tokens a second, times plain")


def draw_thresholds(points: list[dict[str, Any]], path: Path) -> None:
    """Right answers by loops a token, along the thresholds of each exit rule; a line for each kind of answer."""
    title = "melt-tiny: loops a token against right answers, by threshold"
    with picture(path, title, 1, 2, width=9, height=4, sharey=True) as (_, axes):
        for axis, rule in zip(axes[0], ("gate", "settled"), strict=True):
            for kind in dict.fromkeys(point["kind"] for point in points):
                own = [point for point in points if (point["rule"], point["kind"]) == (rule, kind)]
                line = [(point["loops"], 100 * point["right"]) for point in own]
                axis.plot(*zip(*line, strict=True), "o-", label=kind)
            axis.set(title=rule, xlabel="loops a token", xlim=(0.9, 4.1), ylim=(0, 103))
            axis.legend(loc="lower right")
        axes[0, 0].set_ylabel("right answers, %")


def draw_serving(bundles: dict[str, dict[str, Any]], path: Path) -> None:
    """Tokens a second, and time to the first token, by clients at once."""
    with picture(path, "melt serve: clients at once (4 layers of MELT-1.6B, 4 loops)", 1, 2, width=10, height=4) as (
        _,
        axes,
    ):
        rates, waits = axes[0]
        for colour, (bundle, found) in enumerate(bundles.items()):
            rows = [row for row in found["rows"] if row["clients"]]
            clients, name = [row["clients"] for row in rows], bundle.rsplit("-", 1)[1]
            rates.plot(clients, [row["rate"] for row in rows], "o-", color=f"C{colour}", label=name)
            waits.plot(clients, [row["first"][0] for row in rows], "o-", color=f"C{colour}", label=f"{name}, median")
            worst = [row["first"][1] for row in rows]
            waits.plot(clients, worst, "o--", color=f"C{colour}", label=f"{name}, 99 of 100")
        rates.set(title="answers", xlabel="clients", ylabel="tokens a second, all together", ylim=(0, None))
        waits.set(title="first token", xlabel="clients", ylabel="seconds", ylim=(0, None))
        for panel in (rates, waits):
            panel.set_xticks(clients)
            panel.legend(loc="upper left")


def draw_text(found: dict[str, Any], path: Path) -> None:
    """Source code: perplexity by loops a token for fixed depths and both rules, and the drafts that hold by loop."""
    with picture(path, "melt-code: what a loop is worth", 1, 2, width=10, height=4) as (_, axes):
        curve, drafts = axes[0]
        for rule in dict.fromkeys(point["rule"] for point in found["curve"]):
            own = sorted((p["loops"], p["perplexity"]) for p in found["curve"] if p["rule"] == rule)
            curve.plot(*zip(*own, strict=True), "o-", label="every token alike" if rule == "fixed" else f"auto, {rule}")
        least = min(point["perplexity"] for point in found["curve"])
        curve.set(title="leaving early", xlabel="loops a token", ylabel="perplexity of held-out code")
        curve.set(xlim=(1.5, 4.1), ylim=(0.9 * least, 1.8 * least))  # one loop is far above
        curve.legend()
        for row in found["drafts"]:
            style = {"color": "black", "linewidth": 2.5} if row["kind"] == "all" else {"alpha": 0.8}
            held = [100 * share for share in row["held"]]
            drafts.plot(range(1, len(held) + 1), held, "o-", label=row["kind"], **style)
        drafts.set(title="drafts that hold, by kind of the next token", xlabel="loops that the draft took")
        drafts.set(ylabel="%", xticks=range(1, len(held) + 1))
        drafts.legend(loc="lower right", fontsize=8)


def draw_code_runs(runs: list[dict[str, Any]], path: Path) -> None:
    """Source code: perplexity at 4 loops of every kind of gate and recipe, in chunks and one token after another."""
    singly = str(max(int(lag) for run in runs for lag in run["by_lag"]))
    with picture(path, "melt-code's text: perplexity at 4 loops", width=8, height=5) as (_, axes):
        axis, places = axes[0, 0], list(range(len(runs)))[::-1]
        for place, run in zip(places, runs, strict=True):
            axis.plot([run["by_lag"]["0"], run["by_lag"][singly]], [place] * 2, color="#bbbbbb", zorder=1)
        for lag, label in (("0", "in chunks of 64"), (singly, "token by token")):
            axis.scatter([run["by_lag"][lag] for run in runs], places, label=label)
        axis.set_yticks(places, [run["title"] for run in runs])
        axis.set(xlabel="perplexity of the last 64 tokens of held-out rows", xscale="log")
        axis.set_xticks([15, 20, 30, 50, 100, 200, 300], minor=False)
        axis.set_xticks([], minor=True)
        axis.xaxis.set_major_formatter("{x:.0f}")
        axis.legend(loc="upper right")


def main() -> int:
    """Draws them all."""
    for name in ("bench-full", "bench-kv"):
        plot_rows([Row(**row) for row in read(f"{name}.json")["rows"]], DOCS / f"{name}.png")
    draw_memory(read("memory.json")["points"], DOCS / "memory.png")
    draw_batches(read("batches.json")["rows"], DOCS / "batches.png")
    draw_waves(read("decoding-full.json")["rows"] + read("decoding.json")["rows"], DOCS / "decoding.png")
    draw_thresholds(read("answers.json")["curve"], DOCS / "answers.png")
    draw_serving(read("serving.json")["bundles"], DOCS / "serving.png")
    draw_text(read("text.json"), DOCS / "text.png")
    draw_code_runs(read("training-code.json"), DOCS / "training-code.png")
    training = read("training.json")
    draw_runs(training["runs"], DOCS / "training-kinds.png")
    draw_depths(training["accuracy"], DOCS / "training-loops.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
