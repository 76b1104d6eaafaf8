"""Exact match of melt-tiny on held-out problems, by loops and hops.

    python -m melt_models.tiny.evaluate models/melt-tiny
    python -m melt_models.tiny.evaluate models/melt-tiny --exit-gate
    python -m melt_models.tiny.evaluate models/melt-tiny --write-examples 16

The first has a table for each kind of answer: a name, a sentence, step by step. The second lets tokens leave the loop
by the exit gate instead, at several thresholds (``tiny/depth.py``). The third writes ``evaluation.jsonl``, the examples
that an export measures a bundle by. An answer counts when each of its tokens, the end-of-text token included, is the
model's greedy choice.
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
from melt_models.tiny.data import NO_QUESTION, Encoder
from melt_models.tiny.depth import PROMPTS, format_measures, measure_depth
from melt_models.tiny.task import KINDS, MAX_HOPS, NAMES, make_problem

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
    kinds: tuple[str, ...] = NAMES,
) -> dict[int, dict[int, float]]:
    """Measures the fraction of questions answered exactly.

    Args:
        problems: held-out contexts, of ``questions`` questions each, 1 to 4 hops evenly drawn.
        loops: depths to try; each runs on its own, so that the cache holds states of that depth.
        chunk_size: tokens in parallel; default the model's own.
        kinds: kinds of answers, evenly drawn.

    Returns:
        ``table[loops][hops]``, a fraction in [0, 1].
    """
    rng = random.Random(seed)
    drawn = [make_problem(rng, held_out=True, questions=questions, kinds=kinds) for _ in range(problems)]
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
                counted = batch.question != NO_QUESTION
                chosen = model.lm_head(states[-1][counted]).argmax(-1)
                wrong = torch.bincount(batch.question[counted], weights=chosen != batch.targets[-1][counted])
                exact = wrong == 0
                hops = batch.hops[batch.is_name]
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
    """Held-out questions, mixed: ``count`` of each number of hops answered by a name, a quarter as many otherwise."""
    rng = random.Random(seed)
    examples: list[Example] = []
    for kind in KINDS:
        for hops in range(1, MAX_HOPS + 1):
            group = f"{hops} hop{'s' * (hops > 1)}" if kind == "name" else kind
            for _ in range(count if kind == "name" else count // 4):
                problem = make_problem(rng, held_out=True, questions=1, hops=(hops, hops), kinds=(kind,))
                user, assistant = problem.messages()
                examples.append(Example([user], assistant["content"], group))
    rng.shuffle(examples)  # an export takes some of the first ones for its text
    return tuple(examples)


def exit_tables(model: MeltCausalLM, encoder: Encoder, problems: int, chunk_size: int) -> str:
    """What leaving by the exit gate costs and saves: by ways to read a prompt for names, then for the other kinds."""
    tables = []
    ways = [("name", prompt) for prompt in PROMPTS] + [(kind, "apart") for kind in KINDS if kind != "name"]
    for kind, prompt in ways:
        measures = {
            "every loop" if threshold is None else f"{threshold:g}": measure_depth(
                model, encoder, threshold, prompt, problems, model.config.total_ut_steps, chunk_size, kind=kind
            )
            for threshold in THRESHOLDS
        }
        tables.append(f"kind of answer: {kind}; prompt: {PROMPTS[prompt]}\n{format_measures(measures)}")
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
    for kind in KINDS:
        table = exact_match(model, encoder, args.problems, args.questions, depths, chunk, kinds=(kind,))
        print(f"\nkind of answer: {kind}\n{format_table(table)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
