"""The tables of MELT's training at the size of melt-tiny: gate kinds, phases left out, accuracy by loops and hops.

    python -m melt_models.tiny.teacher --out build/melt-tiny-training/teacher
    python -m melt_models.tiny.write_data --rows 6000 --out build/training-data
    python benchmarks/training.py --teacher build/melt-tiny-training/teacher/stage-11 --data build/training-data \\
        --out build/training-tables --jobs 2 --json docs/data/training.json

Every row is a run of the recipe ``melt-tiny-short`` with a few numbers changed, in a process of its own with
one thread. A run that was stopped goes on, and a finished one is only read. ``--json`` writes what the pictures of
docs/training.md show; the tables are printed in Markdown, and OUT/results.json has every number.
"""

import json
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rows import Row, by_title, cache_bytes, parse_arguments, results_of, rows_of_kinds
from transformers import AutoTokenizer

from melt_models import MeltCausalLM
from melt_models.tiny.data import Encoder
from melt_models.tiny.evaluate import exact_match, format_table
from melt_models.training import read_recipe
from melt_models.training.recipe_files import recipe_path

RECIPE = recipe_path("melt-tiny-short")
DEPTHS = (1, 2, 3, 4)
CONTEXTS = 2048
WHOLE = 384


def measure(model: MeltCausalLM, tokenizer: Path) -> dict:
    """Exact match by loops and hops at the trained chunk, at four loops with whole sequences, and the cache's size."""
    encoder = Encoder(AutoTokenizer.from_pretrained(tokenizer))
    return {
        "accuracy": exact_match(model, encoder, CONTEXTS, 1, DEPTHS, 64),
        "whole": exact_match(model, encoder, CONTEXTS, 1, DEPTHS[-1:], WHOLE),
        "cache_bytes": cache_bytes(model),
    }


def percent(result: dict, name: str = "accuracy") -> float:
    """Exact match over 1 to 4 hops at four loops."""
    return 100 * mean(result[name][str(DEPTHS[-1])].values())


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
    args = parse_arguments(__doc__, "token data", "write what benchmarks/pictures.py draws")
    base = read_recipe(RECIPE)
    wanted = rows_of_kinds(base)
    results = results_of(args, wanted, base, args.data, lambda model: measure(model, args.teacher))
    (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    print(tables(results, wanted))
    if args.json is not None:
        args.json.write_text(json.dumps(summary(results, wanted), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
