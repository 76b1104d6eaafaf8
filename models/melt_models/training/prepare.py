"""Turns texts or chats into token data of one length for ``melt-train``.

    python -m melt_models.training.prepare texts.jsonl --tokenizer ByteDance/Ouro-1.4B --length 10000 --out tokens

Input: .jsonl or .parquet with a column ``text``, or ``messages`` (a chat, worded by the tokenizer's chat template), or
.txt with one text a line. Texts are joined, each closed by the end-of-text token, and cut into rows of ``--length``
tokens; what is left at the end is dropped. All tokens are labels.
"""

import argparse
import sys
from importlib import import_module
from pathlib import Path

from melt_models.errors import CheckpointError, missing_package
from melt_models.training.errors import TrainingError


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns the exit status: 0 done, 1 bad input, 130 interrupted."""
    parser = argparse.ArgumentParser(
        prog="python -m melt_models.training.prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=Path, help="texts or chats: .jsonl, .parquet or .txt")
    parser.add_argument(
        "--tokenizer", required=True, help="checkpoint whose tokenizer is used: a folder, or a name on the hub"
    )
    parser.add_argument("--length", type=int, default=10_000, help="tokens a row (default: %(default)s, the paper's)")
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    args = parser.parse_args(argv)
    try:
        rows, dropped = _prepare(args)
    except (TrainingError, CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted; nothing was written", file=sys.stderr)
        return 130
    print(f"{args.out}: {rows} rows of {args.length} tokens; {dropped} tokens at the end were dropped")
    return 0


def _prepare(args: argparse.Namespace) -> tuple[int, int]:
    """Writes the data set; what takes seconds to import is imported here."""
    try:
        for module in ("torch", "melt_models.training.packing"):  # torch first: transformers warns where it is not
            import_module(module)
    except ModuleNotFoundError as error:
        raise TrainingError(missing_package(error, "preparing data", "train")) from error
    from datasets import disable_progress_bars
    from datasets.utils import logging

    from melt_models.hub import checkpoint_folder
    from melt_models.progress import writes_bars
    from melt_models.training.packing import pack_texts

    logging.set_verbosity(logging.CRITICAL)  # what cannot be read is said once, below
    if not writes_bars():
        disable_progress_bars()
    return pack_texts(args.source, checkpoint_folder(args.tokenizer, with_weights=False), args.length, args.out)


if __name__ == "__main__":
    sys.exit(main())
