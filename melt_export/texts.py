"""A checkpoint's tokenizer and the settings beside it: read and checked before any long work."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, TypeAdapter, with_config
from pydantic_core import PydanticCustomError
from tokenizers import Tokenizer
from typing_extensions import TypedDict

from melt_models.forms import STRICT, fitting, read_json, read_text
from melt_runtime.manifest import CHAT_TEMPLATE_NAME, TOKENIZER_NAME

SETTINGS_NAME = "tokenizer_config.json"
_SAMPLE = "A line, 1 or 2.\nÄ 世界 🙂"


@with_config(STRICT)
class _Named(TypedDict):
    name: str
    template: str


def _named(value: Any) -> Any:
    if value is None or isinstance(value, list):
        return value
    if not isinstance(value, str):
        raise PydanticCustomError("template", "Input should be a text or a list of named templates")
    return [{"name": "default", "template": value}]


def _content(value: Any) -> Any:
    return value.get("content", value) if isinstance(value, dict) else value


_Token = Annotated[str | None, BeforeValidator(_content)]


@with_config(STRICT)
class _Settings(TypedDict, total=False):
    chat_template: Annotated[list[_Named] | None, BeforeValidator(_named)]
    bos_token: _Token
    eos_token: _Token
    pad_token: _Token
    unk_token: _Token
    cls_token: _Token
    sep_token: _Token
    mask_token: _Token


_SETTINGS = TypeAdapter(_Settings)


def examine_tokenizer(folder: Path, vocab_size: int | None, faults: list[str]) -> tuple[str, list[str]]:
    """Reads ``tokenizer.json``.

    Args:
        folder: the checkpoint's.
        vocab_size: rows of the embedding, where they are known.
        faults: what is wrong is added, a sentence each.

    Returns:
        The file's content, with neither truncation nor padding, and what was passed over, a sentence each.
    """
    path = folder / TOKENIZER_NAME
    if not path.is_file():
        faults.append(f"{TOKENIZER_NAME} is missing")
        return "", []
    text = read_text(path, faults)
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
    if vocab_size is not None and highest >= vocab_size:
        faults.append(f"{TOKENIZER_NAME} has token id {highest}, but vocab_size is {vocab_size}")
    if not cut:
        return text, []
    return tokenizer.to_str(pretty=True), [
        f"{' and '.join(cut)} of {TOKENIZER_NAME} is left out: a prompt is never cut or filled up"
    ]


def examine_settings(folder: Path, faults: list[str]) -> None:
    """Checks what a chat template is made of: ``tokenizer_config.json`` and ``chat_template.jinja``."""
    path = folder / SETTINGS_NAME
    values = read_json(path, faults) if path.is_file() else None
    if values is not None:
        fitting(_SETTINGS, values, SETTINGS_NAME, faults)
    template = folder / CHAT_TEMPLATE_NAME
    if template.is_file():
        read_text(template, faults)
