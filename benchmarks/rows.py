"""Rows of a table, each a training run with a few numbers of a recipe changed, in a process of its own with one thread.

A run that was stopped goes on, and a finished one is only read.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers

from melt_models import MeltCausalLM, load_checkpoint
from melt_models.training import Phase, Recipe, train
from melt_models.training.saving import read_log

RESULT_NAME = "result.json"


@dataclass(frozen=True)
class Row:
    """One run: what it is called, and what it changes in the recipe."""

    title: str
    changes: dict[str, object] = field(default_factory=dict)
    seed: int = 0

    @property
    def name(self) -> str:
        """Its folder."""
        return f"{self.title.replace(' ', '-')}-seed-{self.seed}"

    def recipe(self, base: Recipe) -> Recipe:
        """The recipe that it runs."""
        return replace(base, seed=self.seed, **self.changes)


def rows_of_kinds(base: Recipe) -> list[Row]:
    """Kinds of gate, three seeds of those that matter, and parts of the recipe left out."""
    text = {"cross_entropy": 1.0}
    kinds = [Row("MELT", {}, seed) for seed in range(3)]
    kinds += [Row(kind, {"gate_kind": kind}, seed) for seed in range(3) for kind in ("last", "scalar")]
    kinds += [Row(kind, {"gate_kind": kind}) for kind in ("ema", "mean")]
    at_once = {"transition": Phase(0), "distillation": replace(base.distillation, steps=base.paired_steps)}
    alone = {"transition": Phase(base.transition.steps, **text), "distillation": Phase(base.distillation.steps, **text)}
    return [
        *kinds,
        Row("without phase 1", at_once),
        Row("without distillation", {**alone, "shallow_steps": 0.0}),
        Row("without chunks", {"chunk_sizes": (0,)}),
    ]


def parse_arguments(about: str | None, data: str, written: str) -> argparse.Namespace:
    """The command line of a table; its ``only`` is for the process of a row.

    Args:
        about: the table.
        data: what ``--data`` is.
        written: what ``--json`` does.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help=data)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time (default: %(default)s)")
    parser.add_argument("--json", type=Path, help=written)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    return parser.parse_args()


def results_of(
    args: argparse.Namespace,
    wanted: Sequence[Row],
    base: Recipe,
    data: Path,
    measure: Callable[[MeltCausalLM], dict[str, Any]],
) -> dict[str, dict[str, Any]]:
    """Runs what is missing and gives what ``measure`` found, by the rows' names and of ``teacher``.

    In the process of one row it trains that one and ends.

    Args:
        args: of ``parse_arguments``.
        wanted: the rows.
        base: recipe that they change.
        data: token data to train on.
        measure: looks at a trained model.

    Raises:
        SystemExit: a run failed; or the row of this process is done.
    """
    if args.only:
        _run_row(next(row for row in wanted if row.name == args.only), args, base, data, measure)
        raise SystemExit(0)
    results = _run_rows(wanted, args.out, args.jobs)
    results["teacher"] = json.loads(json.dumps(measure(load_checkpoint(args.teacher))))
    return results


def _run_row(
    row: Row,
    args: argparse.Namespace,
    base: Recipe,
    data: Path,
    measure: Callable[[MeltCausalLM], dict[str, Any]],
) -> None:
    """Trains and measures one row; in a process of its own."""
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    out = args.out / row.name
    folder = train(row.recipe(base), args.teacher, data, out, device="cpu")
    log = read_log(out)
    result = {**measure(load_checkpoint(folder)), "minutes": log[-1]["seconds"] / 60, "steps": len(log)}
    (out / RESULT_NAME).write_text(json.dumps(result, indent=1) + "\n")


def _run_rows(wanted: Sequence[Row], out: Path, jobs: int) -> dict[str, dict[str, Any]]:
    """Runs what is missing, ``jobs`` at a time: this command again, with ``--only`` and the row's name.

    Raises:
        SystemExit: a run failed.
    """

    def start(row: Row) -> int:
        if (out / row.name / RESULT_NAME).is_file():
            return 0
        out.mkdir(parents=True, exist_ok=True)
        with (out / f"{row.name}.log").open("w") as log:
            done = subprocess.run([sys.executable, *sys.argv, "--only", row.name], stdout=log, stderr=log)
        print(f"{row.name}: {'done' if done.returncode == 0 else f'failed, see {log.name}'}", flush=True)
        return done.returncode

    with ThreadPoolExecutor(jobs) as pool:
        if any(pool.map(start, wanted)):
            raise SystemExit(1)
    return {row.name: json.loads((out / row.name / RESULT_NAME).read_text()) for row in wanted}


def by_title(results: dict[str, dict[str, Any]], wanted: Sequence[Row]) -> dict[str, list[dict[str, Any]]]:
    """The results of every seed of a title; the teacher first."""
    groups = {"teacher": [results["teacher"]]}
    for row in wanted:
        groups.setdefault(row.title, []).append(results[row.name])
    return groups


def cache_bytes(model: MeltCausalLM) -> int:
    """Of one token of context at the trained depth, in float32."""
    config = model.config
    slots = config.total_ut_steps if config.cache_kind == "per_loop" else 1
    return config.num_hidden_layers * slots * 2 * config.num_key_value_heads * config.head_dim * 4
