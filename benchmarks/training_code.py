"""The tables of MELT's training on source code: gate kinds, parts left out, perplexity by loops and by lag.

    make melt-code-teacher
    python benchmarks/training_code.py --teacher build/melt-code-training/teacher/model \\
        --data build/melt-code-training/data --out build/code-tables --jobs 2 --json docs/data/training-code.json

Every row is a run of the recipe ``melt-code-short`` with a few numbers changed, in a process of its own with one
thread. A run that was stopped goes on, and a finished one is only read. The tables are printed in Markdown; ``--json``
writes the mean perplexities of every title by loops and by lag.
"""

import json
import math
import sys
from dataclasses import asdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rows import Row, by_title, cache_bytes, parse_arguments, results_of, rows_of_kinds
from transformers import PreTrainedTokenizerFast

from melt_models import MeltCausalLM
from melt_models.code.evaluate import bytes_of_tokens, measure_depth, measure_waves, read_rows
from melt_models.training import read_recipe
from melt_models.training.recipe_files import recipe_path

RECIPE = recipe_path("melt-code-short")
DEPTHS = (1, 2, 3, 4)
ROWS, CHUNK = 100, 64


def measure(model: MeltCausalLM, teacher: Path, data: Path) -> dict[str, Any]:
    """Losses by loops in chunks, at four loops with whole rows, in waves by lag, and the cache's size."""
    sizes = bytes_of_tokens(PreTrainedTokenizerFast.from_pretrained(teacher))
    held_out, model = read_rows(data / "held_out", ROWS), model.float().eval()
    whole = held_out.shape[1]
    return {
        "loops": {loops: asdict(measure_depth(model, held_out, sizes, loops, CHUNK)) for loops in DEPTHS},
        "whole": asdict(measure_depth(model, held_out, sizes, DEPTHS[-1], whole)),
        "waves": {lag: asdict(one) for lag, one in measure_waves(model, held_out, DEPTHS[-1], CHUNK).items()},
        "cache_bytes": cache_bytes(model),
    }


def spread(values: list[float], digits: int) -> str:
    """The mean, and over several seeds the standard deviation; of nothing, nothing."""
    if not values:
        return ""
    around = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{around}"


def tables(results: dict[str, dict[str, Any]], wanted: list[Row]) -> str:
    """In Markdown."""
    groups = by_title(results, wanted)
    lines = ["| | seeds | perplexity, 1 loop | 2 | 3 | 4 | bits per byte, 4 loops | not in chunks | cache a token |"]
    lines.append("|---" * 9 + "|")
    for title, group in groups.items():
        by_loops = [spread([math.exp(one["loops"][str(loops)]["loss"]) for one in group], 2) for loops in DEPTHS]
        bits = spread([one["loops"]["4"]["bits_per_byte"] for one in group], 3)
        whole = spread([math.exp(one["whole"]["loss"]) for one in group], 2)
        cells = [title, str(len(group)), *by_loops, bits, whole, f"{group[0]['cache_bytes']:,} B"]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "| last 64 tokens | perplexity, in chunks | lag 1 | 2 | 3 | choices as in plain decoding, chunks | lag 1 | 2 |",
    ]
    lines.append("|---" * 8 + "|")
    for title, group in groups.items():
        waves = [one["waves"] for one in group]
        losses = [spread([math.exp(one[lag]["loss"]) for one in waves if lag in one], 2) for lag in "0123"]
        shares = [spread([100 * one[lag]["agreement"] for one in waves if lag in one], 1) for lag in "012"]
        cells = [title, *losses, *(f"{share} %" if share else "" for share in shares)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def summary(results: dict[str, dict[str, Any]], wanted: list[Row]) -> list[dict[str, Any]]:
    """Mean perplexities of every title: by loops in chunks, and of the last tokens by lag (0: in chunks)."""
    return [
        {
            "title": title,
            "seeds": len(group),
            "in_chunks": {n: mean(math.exp(one["loops"][str(n)]["loss"]) for one in group) for n in DEPTHS},
            "by_lag": {lag: mean(math.exp(one["waves"][lag]["loss"]) for one in group) for lag in group[0]["waves"]},
        }
        for title, group in by_title(results, wanted).items()
    ]


def main() -> int:
    """Runs what is missing, then prints the tables."""
    args = parse_arguments(__doc__, "folder with train and held_out", "write mean perplexities by loops")
    base = read_recipe(RECIPE)
    wanted = rows_of_kinds(base)
    data = args.data / "train"
    results = results_of(args, wanted, base, data, lambda model: measure(model, args.teacher, args.data))
    print(tables(results, wanted))
    if args.json is not None:
        args.json.write_text(json.dumps(summary(results, wanted), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
