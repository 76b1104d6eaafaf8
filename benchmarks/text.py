"""What rounding, waves and adaptive depth make of text: perplexity by loops, drafts that hold, loops a token.

    python benchmarks/text.py build/melt-code-float32 build/melt-code-int8 build/melt-code-int4 \\
        --data build/melt-code-training/data --json docs/data/text.json

Bundles of one model, the float32 one first, over held-out token data. Every bundle and kind of KV cache reads rows in
chunks at every depth. What follows is measured with the last bundle but one, over a float KV cache, one token after
another behind the same beginnings: which drafts hold, waves whose drafts all hold, and both rules for leaving early.
At the end the same beginnings are continued greedily, by every way to decode in turns.
"""

import argparse
import json
import keyword
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from melt_export.probe import Passage, Probe
from melt_export.quality import perplexity, trace_bundle
from melt_export.record import open_runner
from melt_export.waves import measure_waves
from melt_models.code.evaluate import read_rows
from melt_models.progress import Progress
from melt_runtime import Manifest, MeltModel, read_manifest
from melt_runtime.bench.forced import fill, run_leaving, run_plain
from melt_runtime.bench.measure import machine
from melt_runtime.execute.executor import Executor
from melt_runtime.memory.plan import Array
from melt_runtime.schedule.depth import Depth, ExitRule

THRESHOLDS: dict[ExitRule, tuple[float, ...]] = {
    "gate": (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95),
    "settled": (0.003, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 1.0),
}


@dataclass(frozen=True)
class Reading:
    """Tokens that were given one after another.

    Attributes:
        losses: cross entropy of the token that follows, in nats, where each left.
        choices: first choices there, token ids.
        loops: that each took.
    """

    losses: Array
    choices: Array
    loops: Array


def rounding(folder: Path, manifest: Manifest, probe: Probe) -> list[dict[str, Any]]:
    """Perplexity of a bundle by kind of KV cache and loops."""
    found = []
    longest = max(len(passage.ids) for passage in probe.passages)
    for kind in manifest.kv_caches:
        runner = open_runner(folder, manifest, longest, kind)
        by_loops = {
            loops: perplexity(trace_bundle(runner, probe, loops), probe)
            for loops in range(1, manifest.model.trained_loops + 1)
        }
        found.append({"bundle": folder.name, "precision": manifest.precision, "kv_cache": kind, "perplexity": by_loops})
    return found


def loss_of(logits: Array, token: int) -> float:
    """Cross entropy, in nats."""
    values = logits.astype(np.float64)
    return float(np.log(np.exp(values - values.max()).sum()) + values.max() - values[token])


def read_plain(executor: Executor, probe: Probe, loops: int) -> tuple[Array, Array]:
    """First choices and losses after each loop of every token that counts, both [tokens, T]."""
    choices, losses = [], []
    for passage in probe.passages:
        fill(executor, passage.ids[: passage.start - 1], loops)
        given, following = passage.ids[passage.start - 1 : -1], iter(np.repeat(passage.ids[passage.start :], loops))

        def read(logits: Array, following: Any = following) -> None:
            choices.append(int(logits.argmax()))
            losses.append(loss_of(logits, int(next(following))))

        run_plain(executor, given, loops, read, after_each_loop=True)
    return np.array(choices).reshape(-1, loops), np.array(losses).reshape(-1, loops)


def read_leaving(executor: Executor, probe: Probe, depth: Depth) -> Reading:
    """Every token that counts leaves when the rule says so."""
    losses, choices, loops = [], [], []
    for passage in probe.passages:
        fill(executor, passage.ids[: passage.start - 1], depth.most)
        following = iter(passage.ids[passage.start :])

        def read(logits: Array, taken: int, following: Any = following) -> None:
            losses.append(loss_of(logits, next(following)))
            choices.append(int(logits.argmax()))
            loops.append(taken)

        run_leaving(executor, passage.ids[passage.start - 1 : -1], depth, read)
    return Reading(np.array(losses), np.array(choices), np.array(loops))


def kind_of(before: str, token: str) -> str:
    """What a token of Python source is; ``before`` is the text in front of it."""
    word = token.strip()
    if "\n" in token or not word:
        return "line end, indentation"
    if word in keyword.kwlist:
        return "keyword"
    if word[0].isdigit():
        return "digit"
    if not (word[0].isalpha() or word[0] == "_"):
        return "sign"
    return "rest of a word" if token == word and (before[-1:].isalnum() or before[-1:] == "_") else "start of a word"


def drafts_by_kind(model: MeltModel, probe: Probe, choices: Array, losses: Array) -> list[dict[str, Any]]:
    """By kind of the token that follows: how many, perplexity by loop, and the share of drafts that hold by loop."""
    decode, kinds = model.codec.tokenizer.decode, []
    for passage in probe.passages:
        for place in range(passage.start, len(passage.ids)):
            before = decode(passage.ids[max(0, place - 4) : place], skip_special_tokens=False)
            kinds.append(kind_of(before, decode([passage.ids[place]], skip_special_tokens=False)))
    named, rows = np.array(kinds), []
    for kind in ("all", *sorted(set(kinds), key=kinds.count, reverse=True)):
        mine = np.ones(len(kinds), dtype=bool) if kind == "all" else named == kind
        held = [float((choices[mine, loop] == choices[mine, -1]).mean()) for loop in range(choices.shape[1])]
        by_loop = [float(np.exp(losses[mine, loop].mean())) for loop in range(choices.shape[1])]
        rows.append({"kind": kind, "tokens": int(mine.sum()), "perplexity": by_loop, "held": held})
    return rows


def ways(loops: int, has_gate: bool) -> dict[str, dict[str, Any]]:
    """How beginnings are continued."""
    found: dict[str, dict[str, Any]] = {"plain": {"loops": loops}}
    found |= {f"wave, lag {lag}": {"loops": loops, "decode": "wave", "lag": lag} for lag in range(1, loops)}
    rules: list[dict[str, Any]] = [{"exit_rule": "settled", "exit_threshold": 0.05}]
    rules += [{"exit_rule": "gate"}] * has_gate
    for rule in rules:
        name = f"auto, {rule['exit_rule']}"
        found[name] = {"loops": "auto", **rule}
        found[f"{name}, wave"] = {**found[name], "decode": "wave", "lag": 1}
    return found


def continued(model: MeltModel, beginnings: Sequence[list[int]], tokens: int, rounds: int) -> list[dict[str, Any]]:
    """Greedy continuations, ways in turns: loops and passes a token, drafts, time, equality with plain decoding's."""
    loops = model.manifest.model.trained_loops
    chosen = ways(loops, model.defaults.exit_threshold is not None)
    seconds: dict[str, list[float]] = {way: [] for way in chosen}
    results: dict[str, list[Any]] = {}
    with Progress("continuing", rounds * len(chosen), "run") as progress:
        for _ in range(rounds):
            for way, settings in chosen.items():
                results[way], spent = [], 0.0
                for ids in beginnings:
                    result = model.generate(ids, max_new_tokens=tokens, temperature=0.0, stop_ids=(), **settings)
                    results[way].append(result)
                    spent += result.timings.decode_seconds
                seconds[way].append(spent)
                progress.advance()
    plain = results["plain"]
    rows = []
    for way, given in results.items():
        count = sum(len(one.token_ids) - 1 for one in given)
        made = [one.drafts for one in given if one.drafts is not None]
        rows.append(
            {
                "way": way,
                "loops": sum(sum(one.loops_per_token) for one in given) / sum(len(one.token_ids) for one in given),
                "passes": sum(one.passes for one in given) / count,
                "held": sum(one.kept for one in made) / max(1, sum(one.made for one in made)) if made else None,
                "equal": sum(a.token_ids == b.token_ids for a, b in zip(given, plain, strict=True)) / len(plain),
                "ms": 1e3 * statistics.median(seconds[way]) / count,
                "times": statistics.median(p / s for p, s in zip(seconds["plain"], seconds[way], strict=True)),
            }
        )
    return rows


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """In Markdown."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)) + "\n"


def show_rounding(found: list[dict[str, Any]]) -> str:
    """Perplexity, and how much of it rounding added at the same depth."""
    exact = found[0]["perplexity"]
    rows = [
        [row["bundle"], row["kv_cache"]]
        + [f"{value:.2f} ({100 * (value / exact[loops] - 1):+.1f} %)" for loops, value in row["perplexity"].items()]
        for row in found
    ]
    return table(["bundle", "KV cache", *(f"{n} loop{'s' * (n > 1)}" for n in exact)], rows)


def show_drafts(rows: list[dict[str, Any]]) -> str:
    """Perplexity and drafts by kind of token."""
    depths = range(1, len(rows[0]["held"]) + 1)
    head = [
        "next token",
        "tokens",
        *(f"perplexity, loop {n}" for n in depths),
        *(f"held, loop {n}" for n in depths[:-1]),
    ]
    lines = [
        [
            row["kind"],
            f"{row['tokens']:,}",
            *(f"{v:.2f}" for v in row["perplexity"]),
            *(f"{v:.1%}" for v in row["held"][:-1]),
        ]
        for row in rows
    ]
    return table(head, lines)


def show_curve(rows: list[dict[str, Any]]) -> str:
    """Perplexity by loops a token."""
    lines = [
        [
            row["rule"],
            f"{row['threshold']:g}",
            f"{row['loops']:.2f}",
            f"{row['perplexity']:.2f}",
            f"{row['agreement']:.1%}",
        ]
        for row in rows
    ]
    return table(["rule", "threshold", "loops a token", "perplexity", "choices as at full depth"], lines)


def show_continued(rows: list[dict[str, Any]]) -> str:
    """Passes, drafts and time by way."""
    lines = [
        [
            *(row["way"], f"{row['loops']:.2f}", f"{row['passes']:.2f}"),
            *("" if row["held"] is None else f"{row['held']:.1%}", f"{row['equal']:.0%}"),
            *(f"{row['ms']:.2f}", f"{row['times']:.2f}"),
        ]
        for row in rows
    ]
    head = [
        "way",
        "loops a token",
        "passes a token",
        "drafts kept",
        "answers as in plain decoding",
        "ms a token",
        "of plain",
    ]
    return table(head, lines)


def main() -> int:
    """Prints tables as they are measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", type=Path, nargs="+", help="of one model, the float32 one first")
    parser.add_argument("--data", type=Path, required=True, help="folder with held_out")
    parser.add_argument("--rows", type=int, default=24, help="of it (default: %(default)s)")
    parser.add_argument("--scored", type=int, default=128, help="tokens of a row read singly (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=64, help="of a continuation (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="of continuations (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything")
    args = parser.parse_args()
    held_out = [row.tolist() for row in read_rows(args.data / "held_out", args.rows)]
    whole = Probe(tuple(Passage(ids, 1) for ids in held_out), "held-out rows")
    ends = Probe(tuple(Passage(ids, len(ids) - args.scored) for ids in held_out), "their ends")
    print("; ".join(f"{name} {value}" for name, value in machine().items()), end="\n\n")
    rounded = [row for folder in args.bundles for row in rounding(folder, read_manifest(folder), whole)]
    print(show_rounding(rounded), flush=True)

    folder = args.bundles[max(0, len(args.bundles) - 2)]
    model, manifest = MeltModel.load(folder, device="cpu"), read_manifest(folder)
    loops, runner = manifest.model.trained_loops, open_runner(folder, manifest, len(held_out[0]))
    executor = Executor(runner.sessions, runner.state)
    choices, losses = read_plain(executor, ends, loops)
    drafts = drafts_by_kind(model, ends, choices, losses)
    print(show_drafts(drafts), flush=True)
    waves = {lag: asdict(one) for lag, one in measure_waves(executor, ends, loops).items()}
    lines = [[lag, f"{w['perplexity']:.2f}", f"{w['agreement']:.1%}", f"{w['held']:.1%}"] for lag, w in waves.items()]
    print(table(["lag", "perplexity", "choices as in plain decoding", "drafts that hold"], lines), flush=True)

    curve = []
    depths = [("fixed", float(n), Depth.fixed(n)) for n in range(1, loops + 1)]
    for rule, thresholds in THRESHOLDS.items():
        if rule != "gate" or manifest.model.has_exit_gate:
            depths += [(rule, threshold, Depth(loops, 1, rule, threshold)) for threshold in thresholds]
    with Progress("leaving", len(depths), "threshold") as progress:
        for name, threshold, depth in depths:
            got = read_leaving(executor, ends, depth)
            curve.append(
                {
                    "rule": name,
                    "threshold": threshold,
                    "loops": float(got.loops.mean()),
                    "perplexity": float(np.exp(got.losses.mean())),
                    "agreement": float((got.choices == choices[:, -1]).mean()),
                }
            )
            progress.advance()
    print(show_curve(curve), flush=True)
    answers = continued(model, [ids[: -args.scored] for ids in held_out], args.tokens, args.rounds)
    print(show_continued(answers))
    if args.json is not None:
        values = {"machine": machine(), "rounding": rounded, "drafts": drafts, "waves": waves, "curve": curve}
        args.json.write_text(json.dumps({**values, "continued": answers}, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
