"""Writes melt-tiny's problems as token data for ``melt_models.training``.

    python -m melt_models.tiny.write_data --out build/melt-tiny-training/data

Every row is a context with six questions, half of them answered by a name, the others in a sentence or step by step;
only the answers' tokens are labels. None of its chains is held out.
"""

import argparse
import random
import sys
from pathlib import Path

from datasets import Dataset, disable_progress_bars

from melt_files import require_absent, staged
from melt_models.progress import Progress
from melt_models.tiny.data import IGNORED, Encoder
from melt_models.tiny.task import MAX_HOPS, MIXED, make_problem
from melt_models.tiny.tokenizer import build_tokenizer
from melt_models.training.errors import TrainingError

TOKENIZER_SEED = 0
"""Of teacher and data alike."""
_ROWS_AT_ONCE = 64


def problem_rows(rows: int, seed: int, questions: int = 6) -> list[dict[str, list[int]]]:
    """``rows`` contexts of 1 to 4 hops as ``input_ids`` and ``labels``."""
    rng, encoder = random.Random(f"data/{seed}"), Encoder(build_tokenizer(TOKENIZER_SEED))
    written: list[dict[str, list[int]]] = []
    with Progress("writing data", rows, "row") as progress:
        while len(written) < rows:
            count = min(_ROWS_AT_ONCE, rows - len(written))
            problems = [make_problem(rng, held_out=False, questions=questions, kinds=MIXED) for _ in range(count)]
            batch = encoder.batch(problems, MAX_HOPS)
            for ids, targets in zip(batch.input_ids, batch.targets[-1], strict=True):
                length = int((ids != encoder.pad_id).sum())
                labels = [IGNORED, *targets[: length - 1].tolist()]
                written.append({"input_ids": ids[:length].tolist(), "labels": labels})
            progress.advance(count)
    return written


def main(argv: list[str] | None = None) -> int:
    """Writes the data set; returns the exit status: 0 done, 1 bad input, 130 interrupted."""
    parser = argparse.ArgumentParser(
        prog="python -m melt_models.tiny.write_data",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    parser.add_argument("--rows", type=int, default=16384, help="contexts (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    args = parser.parse_args(argv)
    disable_progress_bars()  # the rows are the progress
    try:
        if args.rows < 1:
            raise TrainingError(f"--rows must be at least 1, got {args.rows}")
        require_absent(args.out, TrainingError)
        with staged(args.out) as folder:
            Dataset.from_list(problem_rows(args.rows, args.seed)).save_to_disk(str(folder))
    except (TrainingError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted; nothing was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
