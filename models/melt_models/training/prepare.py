"""Turns texts or chats into token data of one length for ``melt-train``.

    python -m melt_models.training.prepare texts.jsonl --tokenizer Ouro-1.4B --length 10000 --out tokens

Input: .jsonl or .parquet with a column ``text``, or ``messages`` (a chat, worded by the tokenizer's chat template), or
.txt with one text a line. Texts are joined, each closed by the end-of-text token, and cut into rows of ``--length``
tokens; what is left at the end is dropped. All tokens are labels.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from datasets import Dataset, disable_progress_bars, load_dataset
from transformers import PreTrainedTokenizerFast

from melt_files import require_absent, staged
from melt_models.checkpoint import CheckpointError, read_config
from melt_models.training.errors import TrainingError

_BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text"}
_TEXTS_AT_ONCE = 1000


def prepare(source: Path, tokenizer_folder: Path, length: int, out: Path) -> tuple[int, int]:
    """Writes the data set ``out``.

    Returns:
        Its rows, and the tokens dropped at the end.

    Raises:
        TrainingError: a source that cannot be read, without texts, or too short for one row; a folder without a
            tokenizer; ``out`` exists.
    """
    require_absent(out, TrainingError)
    if length < 2:
        raise TrainingError(f"length must be at least 2 tokens, got {length}")
    tokenizer, end = _read_tokenizer(tokenizer_folder)
    with tempfile.TemporaryDirectory(prefix="melt-prepare-") as cache:
        texts = _read(source, cache)
        column = next((name for name in ("messages", "text") if name in texts.column_names), None)
        if column is None:
            raise TrainingError(f"{source} must have a column text or messages, got {', '.join(texts.column_names)}")
        left: list[int] = []  # tokens that wait for a full row

        def pack(batch: dict[str, list[Any]]) -> dict[str, list[list[int]]]:
            for value in batch[column]:
                left.extend(_tokens(tokenizer, end, column, value))
            whole = len(left) - len(left) % length
            rows = [left[start : start + length] for start in range(0, whole, length)]
            del left[:whole]
            return {"input_ids": rows}

        packed = texts.map(
            pack, batched=True, batch_size=_TEXTS_AT_ONCE, remove_columns=texts.column_names, desc="tokenizing"
        )
        if not len(packed):
            raise TrainingError(f"{source} gives {len(left)} tokens, fewer than one row of {length}: lower --length")
        with staged(out) as folder:
            packed.save_to_disk(str(folder))
        return len(packed), len(left)


def _read(source: Path, cache: str) -> Dataset:
    builder = _BUILDERS.get(source.suffix)
    if builder is None or not source.is_file():
        raise TrainingError(f"{source} must be a file that ends in {', '.join(_BUILDERS)}")
    try:
        return load_dataset(builder, data_files=str(source), split="train", cache_dir=cache)
    except Exception as error:  # datasets wraps what its readers raise
        raise TrainingError(f"{source} cannot be read as {builder}: {error.__cause__ or error}") from error


def _read_tokenizer(folder: Path) -> tuple[PreTrainedTokenizerFast, int | None]:
    """A checkpoint's tokenizer, and its end-of-text token by the checked configuration: Ouro's published ids err."""
    try:
        config, _ = read_config(folder)
        return PreTrainedTokenizerFast.from_pretrained(folder), next(iter(config.stop_ids), None)
    except (CheckpointError, OSError, ValueError) as error:
        raise TrainingError(f"{folder} has no tokenizer that can be read: {error}") from error


def _tokens(tokenizer: PreTrainedTokenizerFast, end: int | None, column: str, value: Any) -> list[int]:
    text = tokenizer.apply_chat_template(value, tokenize=False) if column == "messages" else value
    ids = tokenizer.encode(text, add_special_tokens=False)
    return ids if end is None or ids[-1:] == [end] else [*ids, end]


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m melt_models.training.prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=Path, help="texts or chats: .jsonl, .parquet or .txt")
    parser.add_argument("--tokenizer", type=Path, required=True, help="checkpoint folder whose tokenizer is used")
    parser.add_argument("--length", type=int, default=10_000, help="tokens a row (default: %(default)s, the paper's)")
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    args = parser.parse_args(argv)
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        rows, dropped = prepare(args.source, args.tokenizer, args.length, args.out)
    except TrainingError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{args.out}: {rows} rows of {args.length} tokens; {dropped} tokens at the end were dropped")
    return 0


if __name__ == "__main__":
    sys.exit(main())
