"""What melt-tiny makes of waves and adaptive depth: right answers, loops and passes a token, drafts that hold.

    python benchmarks/answers.py runtime/melt_runtime/demo/melt-tiny --json docs/data/answers.json

Held-out questions of 1 to 4 hops, of each kind of answer, through the bundle: by every way to decode, and a quarter of
them by thresholds of both exit rules. Deterministic, but for ties of 8-bit products.
"""

import argparse
import json
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

from melt_models.progress import Progress
from melt_models.tiny.task import KINDS, MAX_HOPS, Problem, make_problem
from melt_runtime import MeltModel
from melt_runtime.bench.measure import machine

AUTO: dict[str, Any] = {"loops": "auto", "exit_rule": "gate", "exit_threshold": 0.9}
WAYS: dict[str, dict[str, Any]] = {
    "plain": {"loops": 4},
    "wave, lag 1": {"loops": 4, "decode": "wave", "lag": 1},
    "wave, lag 2": {"loops": 4, "decode": "wave", "lag": 2},
    "wave, lag 3": {"loops": 4, "decode": "wave", "lag": 3},
    "auto, gate 0.9": AUTO,
    "auto, gate 0.9, wave": {**AUTO, "decode": "wave", "lag": 1},
    "auto, settled 0.05": {"loops": "auto", "exit_rule": "settled", "exit_threshold": 0.05},
}
THRESHOLDS = {
    "gate": (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 0.95, 0.98, 0.99, 0.999),
    "settled": (0.001, 0.005, 0.01, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0),
}


@dataclass(frozen=True)
class AnswerRow:
    """Questions of one kind of answer, by one way.

    Attributes:
        way: how they were decoded.
        kind: of answers.
        right: share of answers without a fault.
        loops: of a token, mean over all tokens of all answers.
        passes: for each token that was run: all but an answer's first, which the prompt gives.
        made: drafts that were started.
        kept: drafts that held.
        corrected: drafts that were dropped, by the loop that said so.
        by_hops: of each number of hops, the share that is right and the loops of the name at the end.
    """

    way: str
    kind: str
    right: float
    loops: float
    passes: float
    made: int
    kept: int
    corrected: dict[int, int]
    by_hops: dict[int, tuple[float, float]]


def draw(kind: str, questions: int) -> list[Problem]:
    """Held-out problems, ``questions`` of each number of hops; the same ones each time."""
    rng = Random(f"{kind}/7")
    hops = [hops for hops in range(1, MAX_HOPS + 1) for _ in range(questions)]
    return [make_problem(rng, held_out=True, questions=1, hops=(n, n), kinds=(kind,)) for n in hops]


def ask(model: MeltModel, way: str, settings: dict[str, Any], kind: str, problems: list[Problem]) -> AnswerRow:
    """Answers every problem."""
    right: dict[int, list[bool]] = {hops: [] for hops in range(1, MAX_HOPS + 1)}
    on_name: dict[int, list[int]] = {hops: [] for hops in right}
    loops, tokens, passes, made, kept = 0, 0, 0, 0, 0
    corrected: Counter[int] = Counter()
    for problem in problems:
        (question,) = problem.questions
        result = model.generate(problem.messages()[:1], max_new_tokens=64, **settings)
        right[question.hops].append(result.text == question.reply)
        on_name[question.hops].append(result.loops_per_token[-3 if len(result.loops_per_token) > 2 else 0])
        loops += sum(result.loops_per_token)
        tokens += len(result.token_ids)
        passes += result.passes
        if result.drafts is not None:
            made += result.drafts.made
            kept += result.drafts.kept
            corrected.update(result.drafts.corrected)
    return AnswerRow(
        way=way,
        kind=kind,
        right=sum(map(sum, right.values())) / len(problems),
        loops=loops / tokens,
        passes=passes / (tokens - len(problems)),
        made=made,
        kept=kept,
        corrected=dict(sorted(corrected.items())),
        by_hops={hops: (_mean(right[hops]), _mean(on_name[hops])) for hops in right},
    )


def _mean(values: list[Any]) -> float:
    return sum(values) / len(values)


def show(row: AnswerRow) -> str:
    """A line of the table."""
    drafts = f"{row.kept} of {row.made}" if row.made else ""
    corrected = ", ".join(f"{count} by loop {loop}" for loop, count in row.corrected.items())
    names = " / ".join(f"{loops:.2f}" for _, loops in row.by_hops.values())
    return (
        f"| {row.kind} | {row.way} | {row.right:.2%} | {row.loops:.2f} | {names} | {row.passes:.2f} | {drafts} | "
        f"{corrected} |"
    )


def main() -> int:
    """Prints a table as it is measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="of melt-tiny")
    parser.add_argument("--questions", type=int, default=200, help="of each number of hops (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything")
    args = parser.parse_args()
    if args.questions < 1:
        parser.error(f"--questions must be at least 1, got {args.questions}")
    model = MeltModel.load(args.bundle, device="cpu")
    problems = {kind: draw(kind, args.questions) for kind in KINDS}
    print("; ".join(f"{name} {value}" for name, value in machine().items()))
    print("\n| answers | way | right | loops a token | of the name, by hops | passes a token | drafts kept | dropped |")
    print("|---" * 8 + "|")
    rows = []
    for kind in KINDS:
        for way, settings in WAYS.items():
            rows.append(ask(model, way, settings, kind, problems[kind]))
            print(show(rows[-1]), flush=True)
    curve = []
    with Progress("thresholds", sum(map(len, THRESHOLDS.values())) * len(KINDS), "run") as progress:
        for rule, thresholds in THRESHOLDS.items():
            for threshold in thresholds:
                for kind in KINDS:
                    settings = {"loops": "auto", "exit_rule": rule, "exit_threshold": threshold}
                    row = ask(model, rule, settings, kind, problems[kind][::4])
                    curve.append({"rule": rule, "threshold": threshold, **asdict(row)})
                    progress.advance()
    for rule in THRESHOLDS:
        print(f"\n| {rule}: threshold | " + " | ".join(f"{kind}: right, loops" for kind in KINDS) + " |")
        print("|---" * (len(KINDS) + 1) + "|")
        for threshold in THRESHOLDS[rule]:
            points = [point for point in curve if (point["rule"], point["threshold"]) == (rule, threshold)]
            cells = " | ".join(f"{point['right']:.1%}, {point['loops']:.2f}" for point in points)
            print(f"| {threshold:g} | {cells} |")
    if args.json is not None:
        values = {"machine": machine(), "questions": args.questions, "rows": [asdict(row) for row in rows]}
        args.json.write_text(json.dumps({**values, "curve": curve}, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
