"""Makes what ships of a trained melt-code: bfloat16 weights, the tokenizer, the list of sources.

    python -m melt_models.code.ship build/melt-code-training/waves/model --data build/melt-code-training/data \\
        --out build/melt-code-checkpoint

The card is written by hand and stays where it is.
"""

import argparse
import shutil
import sys
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from melt_files import require_absent, staged
from melt_models.checkpoint import load_checkpoint
from melt_models.errors import CheckpointError
from melt_models.training.errors import TrainingError

SOURCES = "sources.json"


def ship(model: Path, data: Path, out: Path) -> None:
    """Writes the folder ``out``.

    Args:
        model: the trained checkpoint, with its tokenizer.
        data: the folder that ``melt_models.code.write_data`` made.

    Raises:
        TrainingError: ``out`` exists, or ``data`` has no list of sources.
        CheckpointError: of the checkpoint.
    """
    require_absent(out, TrainingError)
    if not (data / SOURCES).is_file():
        raise TrainingError(f"--data must have {SOURCES}, got {data}: give what melt_models.code.write_data made")
    trained, tokenizer = load_checkpoint(model), PreTrainedTokenizerFast.from_pretrained(model)
    with staged(out) as folder:
        trained.to(torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        shutil.copy(data / SOURCES, folder / SOURCES)


def main(argv: list[str] | None = None) -> int:
    """Writes the folder; returns the exit status: 0 done, 1 bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m melt_models.code.ship",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", type=Path, help="the trained checkpoint")
    parser.add_argument("--data", type=Path, required=True, help=f"folder with {SOURCES}")
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    args = parser.parse_args(argv)
    try:
        ship(args.model, args.data, args.out)
    except (TrainingError, CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
