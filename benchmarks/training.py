"""The tables of MELT's training at the size of melt-tiny: gate kinds, phases left out, accuracy by loops and hops.

    python -m melt_models.tiny.teacher --out build/melt-tiny-training/teacher
    python -m melt_models.tiny.write_data --rows 6000 --out build/training-data
    python benchmarks/training.py --teacher build/melt-tiny-training/teacher/stage-11 --data build/training-data \\
        --out build/training-tables --jobs 2 --json docs/data/training.json

Every row is a run of the recipe ``melt-tiny-short`` with a few numbers changed, in a process of its own with
one thread. A run that was stopped goes on, and a finished one is only read. ``--json`` writes what the pictures of
docs/training.md show; the tables are printed in Markdown, and OUT/results.json has every number.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer

from melt_models import MeltCausalLM, load_checkpoint
from melt_models.tiny.data import Encoder
from melt_models.tiny.evaluate import exact_match, format_table
from melt_models.training import Phase, Recipe, read_recipe, train
from melt_models.training.recipe_files import recipe_path
from melt_models.training.saving import read_log

ROOT = Path(__file__).parent.parent
RECIPE = recipe_path("melt-tiny-short")
DEPTHS = (1, 2, 3, 4)
CONTEXTS = 2048
WHOLE = 384
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


def rows(base: Recipe) -> list[Row]:
    """Every run of tables (a) and (b)."""
    text = {"cross_entropy": 1.0}
    kinds = [Row("MELT", {}, seed) for seed in range(3)]
    kinds += [Row(kind, {"gate_kind": kind}, seed) for seed in range(3) for kind in ("last", "scalar")]
    kinds += [Row(kind, {"gate_kind": kind}) for kind in ("ema", "mean")]
    at_once = {"transition": Phase(0), "distillation": replace(base.distillation, steps=base.steps)}
    alone = {"transition": Phase(base.transition.steps, **text), "distillation": Phase(base.distillation.steps, **text)}
    return [
        *kinds,
        Row("without phase 1", at_once),
        Row("without distillation", {**alone, "shallow_steps": 0.0}),
        Row("without chunks", {"chunk_sizes": (0,)}),
    ]


def run_row(row: Row, args: argparse.Namespace) -> None:
    """Trains and measures one row; in a process of its own."""
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    out = args.out / row.name
    folder = train(row.recipe(read_recipe(RECIPE)), args.teacher, args.data, out, device="cpu")
    log = read_log(out)
    result = {**measure(load_checkpoint(folder), args.teacher), "minutes": log[-1]["seconds"] / 60, "steps": len(log)}
    (out / RESULT_NAME).write_text(json.dumps(result, indent=1) + "\n")


def measure(model: MeltCausalLM, tokenizer: Path) -> dict:
    """Exact match by loops and hops at the trained chunk, at four loops with whole sequences, and the cache's size."""
    encoder, config = Encoder(AutoTokenizer.from_pretrained(tokenizer)), model.config
    slots = config.total_ut_steps if config.cache_kind == "per_loop" else 1
    row_bytes = 2 * config.num_key_value_heads * config.head_dim * 4
    return {
        "accuracy": exact_match(model, encoder, CONTEXTS, 1, DEPTHS, 64),
        "whole": exact_match(model, encoder, CONTEXTS, 1, DEPTHS[-1:], WHOLE),
        "cache_bytes": config.num_hidden_layers * slots * row_bytes,
    }


def percent(result: dict, name: str = "accuracy") -> float:
    """Exact match over 1 to 4 hops at four loops."""
    return 100 * mean(result[name][str(DEPTHS[-1])].values())


def by_title(results: dict[str, dict], wanted: list[Row]) -> dict[str, list[dict]]:
    """The results of every seed of a title; the teacher first."""
    groups: dict[str, list[dict]] = {"teacher": [results["teacher"]]}
    for row in wanted:
        groups.setdefault(row.title, []).append(results[row.name])
    return groups


def tables(results: dict[str, dict], wanted: list[Row]) -> str:
    """Tables in Markdown."""
    lines = ["| | exact match, 4 loops | seeds | 1 hop | 2 hops | 3 hops | 4 hops | not in chunks | cache a token |"]
    lines.append("|---" * 9 + "|")
    for title, group in by_title(results, wanted).items():
        scores = [percent(result) for result in group]
        spread = f" ± {stdev(scores):.1f}" if len(scores) > 1 else ""
        hops = [100 * mean(r["accuracy"]["4"][str(hop)] for r in group) for hop in DEPTHS]
        whole = mean(percent(result, "whole") for result in group)
        cells = [f"{mean(scores):.1f}{spread}", str(len(group)), *(f"{hop:.1f}" for hop in hops), f"{whole:.1f}"]
        lines.append(f"| {title} | " + " | ".join(cells) + f" | {group[0]['cache_bytes']} B |")
    for name in ("teacher", "MELT-seed-0"):
        by_loops = {int(d): {int(h): v for h, v in row.items()} for d, row in results[name]["accuracy"].items()}
        lines += ["", name, "", format_table(by_loops)]
    return "\n".join(lines)


def summary(results: dict[str, dict], wanted: list[Row]) -> dict[str, Any]:
    """What ``benchmarks/pictures.py`` draws: exact match of every title, and by loops and hops."""
    runs = []
    for title, group in by_title(results, wanted).items():
        scores = [percent(result) for result in group]
        spread = stdev(scores) if len(scores) > 1 else None
        runs.append({"title": title, "mean": mean(scores), "spread": spread, "seeds": len(scores)})
    accuracy = {
        title: {
            str(depth): {str(hop): 100 * results[name]["accuracy"][str(depth)][str(hop)] for hop in DEPTHS}
            for depth in DEPTHS
        }
        for title, name in (("Teacher", "teacher"), ("MELT", "MELT-seed-0"))
    }
    return {"runs": runs, "accuracy": accuracy}


def main() -> int:
    """Runs what is missing, then prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write what benchmarks/pictures.py draws")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    args = parser.parse_args()
    wanted = rows(read_recipe(RECIPE))
    if args.only:
        run_row(next(row for row in wanted if row.name == args.only), args)
        return 0

    def start(row: Row) -> int:
        if (args.out / row.name / RESULT_NAME).is_file():
            return 0
        args.out.mkdir(parents=True, exist_ok=True)
        with (args.out / f"{row.name}.log").open("w") as log:
            done = subprocess.run([sys.executable, *sys.argv, "--only", row.name], stdout=log, stderr=log)
        print(f"{row.name}: {'done' if done.returncode == 0 else f'failed, see {log.name}'}", flush=True)
        return done.returncode

    with ThreadPoolExecutor(args.jobs) as pool:
        if any(pool.map(start, wanted)):
            return 1
    results = {row.name: json.loads((args.out / row.name / RESULT_NAME).read_text()) for row in wanted}
    results["teacher"] = json.loads(json.dumps(measure(load_checkpoint(args.teacher), args.teacher)))
    (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    print(tables(results, wanted))
    if args.json is not None:
        args.json.write_text(json.dumps(summary(results, wanted), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
