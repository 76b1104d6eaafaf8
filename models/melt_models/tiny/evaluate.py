"""Exact match of melt-tiny on held-out problems, by loops and hops.

    python -m melt_models.tiny.evaluate models/melt-tiny
    python -m melt_models.tiny.evaluate models/melt-tiny --exit-gate
    python -m melt_models.tiny.evaluate models/melt-tiny --write-examples 16

The second command lets tokens leave the loop by the exit gate instead, at several thresholds (``tiny/depth.py``). The
third writes ``evaluation.jsonl``, the examples that an export measures a bundle by. An answer counts when
each of its tokens, the end-of-text token included, is the model's greedy choice.
"""

import argparse
import random
import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer

from melt_models.checkpoint import load_checkpoint
from melt_models.errors import CheckpointError
from melt_models.evaluation import Example, write_examples
from melt_models.modeling import KVCache, MeltCausalLM
from melt_models.progress import Progress
from melt_models.tiny.data import ANSWER_TOKENS, Encoder
from melt_models.tiny.depth import PROMPTS, format_measures, measure_depth
from melt_models.tiny.task import MAX_HOPS, make_problem

THRESHOLDS = (None, 0.5, 0.7, 0.9, 0.95, 0.98)
"""Of the exit gate; with None every token takes every loop."""


@torch.no_grad()
def exact_match(
    model: MeltCausalLM,
    encoder: Encoder,
    problems: int = 256,
    questions: int = 4,
    loops: tuple[int, ...] = (1, 2, 3, 4),
    chunk_size: int | None = None,
    seed: int = 1,
) -> dict[int, dict[int, float]]:
    """Measures the fraction of questions answered exactly.

    Args:
        problems: held-out contexts, of ``questions`` questions each, 1 to 4 hops evenly drawn.
        loops: depths to try; each runs on its own, so that the cache holds states of that depth.
        chunk_size: tokens in parallel; default the model's own.

    Returns:
        ``table[loops][hops]``, a fraction in [0, 1].
    """
    rng = random.Random(seed)
    drawn = [make_problem(rng, held_out=True, questions=questions) for _ in range(problems)]
    batches = [encoder.batch(drawn[start : start + 64], loops=MAX_HOPS) for start in range(0, problems, 64)]
    table: dict[int, dict[int, float]] = {}
    with Progress("evaluating", len(loops) * len(batches), "part") as progress:
        for depth in loops:
            right = torch.zeros(MAX_HOPS + 1)
            asked = torch.zeros(MAX_HOPS + 1)
            for batch in batches:
                states, _ = model.model(
                    batch.input_ids, depth, chunk_size or model.config.chunk_size, KVCache(model.config)
                )
                rows, places = batch.is_name.nonzero(as_tuple=True)
                exact = torch.ones(len(rows), dtype=torch.bool)
                for offset in range(ANSWER_TOKENS):
                    chosen = model.lm_head(states[-1][rows, places + offset]).argmax(-1)
                    exact &= chosen == batch.targets[-1][rows, places + offset]
                hops = batch.hops[rows, places]
                right += torch.bincount(hops, weights=exact.float(), minlength=MAX_HOPS + 1)
                asked += torch.bincount(hops, minlength=MAX_HOPS + 1)
                progress.advance()
            table[depth] = {hop: (right[hop] / asked[hop]).item() for hop in range(1, MAX_HOPS + 1)}
    return table


def format_table(table: dict[int, dict[int, float]]) -> str:
    """The table in Markdown, loops down and hops across, in percent."""
    hops = list(next(iter(table.values())))
    lines = ["| loops | " + " | ".join(f"{hop} hop{'s' * (hop > 1)}" for hop in hops) + " | all |"]
    lines.append("|---" * (len(hops) + 2) + "|")
    for depth, row in table.items():
        cells = [f"{100 * value:.1f}" for value in (*row.values(), sum(row.values()) / len(row))]
        lines.append(f"| {depth} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw_examples(count: int, seed: int = 21) -> tuple[Example, ...]:
    """Held-out questions, ``count`` of each number of hops."""
    rng = random.Random(seed)
    examples: list[Example] = []
    missing = dict.fromkeys(range(1, MAX_HOPS + 1), count)
    while any(missing.values()):
        problem = make_problem(rng, held_out=True, questions=1)
        (question,) = problem.questions
        if missing[question.hops]:
            missing[question.hops] -= 1
            user, assistant = problem.messages()
            group = f"{question.hops} hop{'s' * (question.hops > 1)}"
            examples.append(Example([user], assistant["content"], group))
    return tuple(examples)


def exit_tables(model: MeltCausalLM, encoder: Encoder, problems: int, chunk_size: int) -> str:
    """What leaving by the exit gate costs and saves, a table for each way to read a prompt."""
    tables = []
    for prompt, meaning in PROMPTS.items():
        measures = {
            "every loop" if threshold is None else f"{threshold:g}": measure_depth(
                model, encoder, threshold, prompt, problems, model.config.total_ut_steps, chunk_size
            )
            for threshold in THRESHOLDS
        }
        tables.append(f"prompt: {meaning}\n{format_measures(measures)}")
    return "\n\n".join(tables)


def main(argv: list[str] | None = None) -> int:
    """Prints the tables."""
    parser = argparse.ArgumentParser(
        prog="python -m melt_models.tiny.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", type=Path, help="folder of melt-tiny")
    parser.add_argument("--problems", type=int, default=2048, help="held-out contexts (default: %(default)s)")
    parser.add_argument("--questions", type=int, default=1, help="questions a context (default: %(default)s)")
    parser.add_argument("--chunk", type=int, help="tokens in parallel (default: the trained chunk)")
    parser.add_argument("--max-loops", type=int, default=6, help="depths 1 to this (default: %(default)s)")
    parser.add_argument("--exit-gate", action="store_true", help="depth by the exit gate, one question a context")
    parser.add_argument("--write-examples", type=int, metavar="N", help="write N questions of each number of hops")
    args = parser.parse_args(argv)
    for name in ("problems", "questions", "chunk", "max_loops", "write_examples"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    try:
        if args.write_examples is not None:
            write_examples(args.checkpoint, draw_examples(args.write_examples))
            return 0
        model = load_checkpoint(args.checkpoint)
        encoder = Encoder(AutoTokenizer.from_pretrained(args.checkpoint))
    except (CheckpointError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    chunk = args.chunk or model.config.chunk_size
    if args.exit_gate:
        if model.model.early_exit_gate is None:
            print(f"error: {args.checkpoint} has no exit gate: leave --exit-gate out", file=sys.stderr)
            return 1
        print(f"{args.problems} held-out contexts, one question each, chunk {chunk}; exact match in percent")
        print(exit_tables(model, encoder, args.problems, chunk))
        return 0
    depths = tuple(range(1, args.max_loops + 1))
    print(f"exact match in percent, {args.problems} held-out contexts, {args.questions} questions each, chunk {chunk}")
    print(format_table(exact_match(model, encoder, args.problems, args.questions, depths, chunk)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
