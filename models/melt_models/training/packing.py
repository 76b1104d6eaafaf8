"""Texts or chats, joined and cut into rows of one length."""

import tempfile
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from melt_files import require_absent, staged
from melt_models.checkpoint import read_config
from melt_models.errors import CheckpointError
from melt_models.progress import Progress
from melt_models.training.errors import TrainingError

# Not datasets.load_dataset: it counts every load of a local file, too, by a request to a server of Hugging Face.
_READERS = {
    ".jsonl": ("json", Dataset.from_json),
    ".json": ("json", Dataset.from_json),
    ".parquet": ("parquet", Dataset.from_parquet),
    ".txt": ("text", Dataset.from_text),
}
_TEXTS_AT_ONCE = 1000


def pack_texts(source: Path, tokenizer_folder: Path, length: int, out: Path) -> tuple[int, int]:
    """Writes the data set ``out``.

    Args:
        source: texts or chats.
        tokenizer_folder: a checkpoint's; its weights are not read.
        length: tokens of a row.
        out: folder to make.

    Returns:
        Its rows, and the tokens dropped at the end.

    Raises:
        TrainingError: a source that cannot be read, without texts, or too short for one row; a text that is none; a
            folder without a tokenizer; ``out`` exists.
    """
    require_absent(out, TrainingError)
    if length < 2:
        raise TrainingError(f"length must be at least 2 tokens, got {length}")
    tokenizer, end = _read_tokenizer(tokenizer_folder)
    # What datasets caches lies in the folder in the making: whatever ends this process, the next one removes it.
    with staged(out) as folder, tempfile.TemporaryDirectory(prefix="cache-", dir=folder) as cache:
        texts = _read(source, cache)
        column = next((name for name in ("messages", "text") if name in texts.column_names), None)
        if column is None:
            raise TrainingError(f"{source} must have a column text or messages, got {', '.join(texts.column_names)}")
        left: list[int] = []  # tokens that wait for a full row

        with Progress("tokenizing", len(texts), "text", draws_bar=False) as progress:

            def pack(batch: dict[str, list[Any]]) -> dict[str, list[list[int]]]:
                for index, value in enumerate(batch[column]):
                    left.extend(_tokens(tokenizer, end, column, value, f"{source}, text {progress.done + index + 1}"))
                progress.advance(len(batch[column]))
                whole = len(left) - len(left) % length
                rows = [left[start : start + length] for start in range(0, whole, length)]
                del left[:whole]
                return {"input_ids": rows}

            packed = texts.map(
                pack, batched=True, batch_size=_TEXTS_AT_ONCE, remove_columns=texts.column_names, desc="tokenizing"
            )
        if not len(packed):
            raise TrainingError(f"{source} gives {len(left)} tokens, fewer than one row of {length}: lower --length")
        packed.save_to_disk(str(folder))
        return len(packed), len(left)


def _read(source: Path, cache: str) -> Dataset:
    if source.suffix not in _READERS:
        raise TrainingError(f"{source} must end in {', '.join(_READERS)}")
    form, read = _READERS[source.suffix]
    if not source.is_file():
        raise TrainingError(f"{source} does not exist, or is no file")
    if not source.stat().st_size:
        raise TrainingError(f"{source} is empty")
    try:
        texts = read(str(source), cache_dir=cache)
    except Exception as error:  # datasets wraps what its readers raise
        raise TrainingError(f"{source} cannot be read as {form}: {error.__cause__ or error}") from error
    if not len(texts):
        raise TrainingError(f"{source} holds no texts")
    return texts


def _read_tokenizer(folder: Path) -> tuple[PreTrainedTokenizerFast, int | None]:
    """A checkpoint's tokenizer, and its end-of-text token by the checked configuration: Ouro's published ids err."""
    config, _ = read_config(folder)
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    except Exception as error:  # tokenizers raises plain exceptions for a file that it refuses
        raise CheckpointError(f"{folder} has no tokenizer that can be read: {error}") from error
    return tokenizer, next(iter(config.stop_ids), None)


def _tokens(tokenizer: PreTrainedTokenizerFast, end: int | None, column: str, value: Any, where: str) -> list[int]:
    """The tokens of one text or chat.

    Raises:
        TrainingError: it is no text, or a chat that the template does not take.
    """
    if column == "text" and not isinstance(value, str):
        raise TrainingError(f"{where} must be a text, got {value!r}: leave the row out or correct it")
    try:
        text = tokenizer.apply_chat_template(value, tokenize=False) if column == "messages" else value
        ids = tokenizer.encode(text, add_special_tokens=False)
    except Exception as error:  # a template raises what it likes, tokenizers its own for what is no UTF-8
        raise TrainingError(f"{where} cannot be tokenized: {error}; leave the row out or correct it") from error
    return ids if end is None or ids[-1:] == [end] else [*ids, end]
