"""A checkpoint's tokenizer, read and checked before any long work."""

from pathlib import Path

from tokenizers import Tokenizer

from melt_export.tokens import as_transformers
from melt_models.forms import is_there, read_text
from melt_runtime.bundle.manifest import TOKENIZER_NAME

_SAMPLE = "A line, 1 or 2.\nÄ 世界 🙂"


def examine_tokenizer(folder: Path, vocab_size: int | None, faults: list[str]) -> tuple[str, list[str]]:
    """Reads ``tokenizer.json``.

    Args:
        folder: the checkpoint's.
        vocab_size: rows of the embedding, where they are known.
        faults: what is wrong is added, a sentence each.

    Returns:
        The tokenizer as transformers reads it, with neither truncation nor padding, and what was taken or passed over,
        a sentence each.
    """
    path = folder / TOKENIZER_NAME
    text = read_text(path, faults) if is_there(path, faults, f"{TOKENIZER_NAME} is missing") else None
    if text is None:
        return "", []
    published = text
    if (tokenizer := _usable(text, faults)) is None:
        return "", []
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    highest = max(vocabulary.values(), default=-1)
    notes: list[str] = []
    if cut := [name for name in ("truncation", "padding") if getattr(tokenizer, name) is not None]:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        text = tokenizer.to_str(pretty=True)
        notes.append(f"{' and '.join(cut)} of {TOKENIZER_NAME} is left out: a prompt is never cut or filled up")
    if vocab_size is not None and highest >= vocab_size:
        faults.append(f"{TOKENIZER_NAME} has token id {highest}, but vocab_size is {vocab_size}")
        return text, notes
    made = as_transformers(folder, text, vocab_size, faults, notes)
    if made == published:
        return made, notes
    if shared := _of_one_id(vocabulary):
        faults.append(
            f"{TOKENIZER_NAME}: tokens {shared[0]!r} and {shared[1]!r} share an id, and one would be lost where "
            "the file is written anew: give each its own"
        )
        return "", []
    return (made, notes) if _usable(made, faults) else ("", [])


def _of_one_id(vocabulary: dict[str, int]) -> list[str]:
    """The first two tokens that share an id, if any do."""
    by_id: dict[int, str] = {}
    for token, number in sorted(vocabulary.items()):
        if number in by_id:
            return [by_id[number], token]
        by_id[number] = token
    return []


def _usable(text: str, faults: list[str]) -> Tokenizer | None:
    """A tokenizer that encodes and decodes; else what is wrong is added to ``faults``."""
    try:
        tokenizer = Tokenizer.from_str(text)
        tokenizer.decode(tokenizer.encode(_SAMPLE, add_special_tokens=False).ids)
    except BaseException as error:  # the library has no error of its own; where it panics, not even an Exception
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        faults.append(f"{TOKENIZER_NAME} cannot be used: {error}; fetch the file again")
        return None
    return tokenizer
