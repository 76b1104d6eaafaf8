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
    try:
        tokenizer = Tokenizer.from_str(text)
        highest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        cut = [name for name in ("truncation", "padding") if getattr(tokenizer, name) is not None]
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.decode(tokenizer.encode(_SAMPLE, add_special_tokens=False).ids)
    except BaseException as error:  # the library has no error of its own; where it panics, not even an Exception
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        faults.append(f"{TOKENIZER_NAME} cannot be used: {error}; fetch the file again")
        return "", []
    notes = []
    if cut:
        text = tokenizer.to_str(pretty=True)
        notes.append(f"{' and '.join(cut)} of {TOKENIZER_NAME} is left out: a prompt is never cut or filled up")
    if vocab_size is not None and highest >= vocab_size:
        faults.append(f"{TOKENIZER_NAME} has token id {highest}, but vocab_size is {vocab_size}")
        return text, notes
    return as_transformers(folder, text, vocab_size, faults, notes), notes
