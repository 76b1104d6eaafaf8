"""A checkpoint's tokenizer as transformers reads it: ``tokenizer.json`` and the files beside it that change its ids.

``tokenizer.json`` is taken as it is, with the tokens that only ``tokenizer_config.json``, ``added_tokens.json`` or
``special_tokens_map.json`` have. Of a Llama tokenizer transformers keeps vocabulary and merges alone and makes the rest
anew (``legacy`` and ``add_prefix_space`` decide where a space is put in front); so does this module, by transformers'
own code. Other classes that transformers would make anew are left as their ``tokenizer.json`` has them.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

from tokenizers import Tokenizer
from transformers import CodeLlamaTokenizer, LlamaTokenizer, TokenizersBackend
from transformers.utils import logging

from melt_export.templates import MAP_NAME, SETTINGS_NAME, SPECIAL_TOKENS
from melt_models.checkpoint import CONFIG_NAME
from melt_models.forms import is_there, read_json, shown
from melt_runtime.bundle.manifest import TOKENIZER_NAME

ADDED_NAME = "added_tokens.json"
_REBUILT = {"LlamaTokenizer": LlamaTokenizer, "CodeLlamaTokenizer": CodeLlamaTokenizer}
_LISTS = ("additional_special_tokens", "extra_special_tokens")
_SPLITTING = ("normalizer", "pre_tokenizer", "model", "decoder")


@dataclass(frozen=True)
class _Named:
    """A token that a file beside ``tokenizer.json`` names.

    Attributes:
        file: the file's name.
        text: the token's text.
        token: the id that the file says; None where it says none.
    """

    file: str
    text: str
    token: int | None


def as_transformers(folder: Path, text: str, vocab_size: int | None, faults: list[str], notes: list[str]) -> str:
    """The tokenizer of a checkpoint with what the files beside it say.

    Args:
        folder: the checkpoint's.
        text: content of its ``tokenizer.json``, which the library can read.
        vocab_size: rows of the embedding, where they are known.
        faults: what is wrong is added, a sentence each: files that transformers refuses, tokens that contradict
            ``tokenizer.json`` or have no row in the embedding.
        notes: what was taken or left out is added, a sentence each.

    Returns:
        The content of a ``tokenizer.json``; ``text`` itself where the files change no id.
    """
    told_elsewhere: list[str] = []  # with the chat template
    before = len(faults)
    settings, older = (_read(folder / name, told_elsewhere) for name in (SETTINGS_NAME, MAP_NAME))
    added = _read(folder / ADDED_NAME, faults)
    if told_elsewhere or len(faults) > before or not (settings or older or added):
        return text
    kind = settings.get("tokenizer_class") or _read(folder / CONFIG_NAME, told_elsewhere).get("tokenizer_class")
    files = {SETTINGS_NAME: settings, MAP_NAME: older, ADDED_NAME: added}
    try:
        theirs = _load({name: values for name, values in files.items() if values}, text, str(kind))
        named = list(_named(settings, older, added))
    except BaseException as error:  # transformers checks little; where the library panics, not even an Exception
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        faults.append(f"{', '.join(name for name in files if files[name])}: transformers refuses them: {error!r}")
        return text
    padding = {_content(values.get("pad_token")) for values in (settings, older)}
    if left := [each for each in named if each.text in padding and _has_no_row(each, theirs, vocab_size)]:
        theirs = _without(theirs, {each.text for each in left})
        notes.append(f"{left[0].file}: the padding token {left[0].text!r} has no row in the embedding and is left out")
        named = [each for each in named if each not in left]
    known = {*Tokenizer.from_str(text).get_vocab(), *(each.text for each in named)}
    named += [_Named(SETTINGS_NAME, name, None) for name in theirs.get_vocab() if name not in known]
    faults += dict.fromkeys(fault for each in named for fault in _contradictions(each, theirs, vocab_size))
    return text if len(faults) > before else _merged(text, theirs, notes)


def _read(path: Path, faults: list[str]) -> dict[str, Any]:
    return (read_json(path, faults) or {}) if is_there(path, faults) else {}


def _load(files: Mapping[str, Mapping[str, Any]], text: str, kind: str) -> Tokenizer:
    """What transformers makes of a tokenizer's files, which it reads from a folder that holds nothing else."""
    kind = kind.removesuffix("Fast")
    maker = _REBUILT[kind] if kind in _REBUILT and '"ByteLevel"' not in text else TokenizersBackend
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it warns where its class is not the file's
    try:
        with TemporaryDirectory() as place:
            (Path(place) / TOKENIZER_NAME).write_text(text, encoding="utf-8")
            for name, values in files.items():
                own = {key: value for key, value in values.items() if key not in ("chat_template", "auto_map")}
                if name == SETTINGS_NAME:  # older files leave out what kind of object a token is
                    forms = {key: own[key] for key in SPECIAL_TOKENS if isinstance(own.get(key), dict)}
                    own |= {key: {"__type": "AddedToken", **form} for key, form in forms.items()}
                (Path(place) / name).write_text(json.dumps(own), encoding="utf-8")
            tokenizer = maker.from_pretrained(place, local_files_only=True).backend_tokenizer
    finally:
        logging.set_verbosity(verbosity)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return cast(Tokenizer, tokenizer)


def _named(settings: Mapping[str, Any], older: Mapping[str, Any], added: Mapping[str, Any]) -> Iterator[_Named]:
    yield from (
        _Named(SETTINGS_NAME, form["content"], int(token))
        for token, form in settings.get("added_tokens_decoder", {}).items()
    )
    yield from (_Named(ADDED_NAME, text, int(token)) for text, token in added.items())
    for file, values in ((SETTINGS_NAME, settings), (MAP_NAME, older)):
        lists = [values[name] for name in _LISTS if values.get(name)]
        parts = [part for each in lists for part in (each.values() if isinstance(each, dict) else each)]
        for value in (*(values.get(name) for name in SPECIAL_TOKENS), *parts):
            if (text := _content(value)) is not None:
                yield _Named(file, text, None)


def _content(value: Any) -> str | None:
    """The text of a token, which a file writes alone or with its properties."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) and text else None


def _has_no_row(named: _Named, theirs: Tokenizer, vocab_size: int | None) -> bool:
    token = theirs.token_to_id(named.text)
    return token is not None and vocab_size is not None and token >= vocab_size


def _contradictions(named: _Named, theirs: Tokenizer, vocab_size: int | None) -> list[str]:
    """Why a named token cannot be taken."""
    token, where = theirs.token_to_id(named.text), f"{named.file}: the token {shown(named.text)}"
    if token is None:
        return [
            f"{where} is not in {TOKENIZER_NAME}, and transformers does not take it from there: add it, or remove it"
        ]
    if named.token is not None and named.token != token:
        return [f"{where} must have the id {token} that transformers gives it, got {named.token}: correct the file"]
    if _has_no_row(named, theirs, vocab_size):
        return [f"{where} has the id {token}, which must be below vocab_size ({vocab_size}): remove it from the file"]
    return []


def _without(tokenizer: Tokenizer, texts: set[str]) -> Tokenizer:
    """A tokenizer without some of its added tokens."""
    values = json.loads(tokenizer.to_str())
    values["added_tokens"] = [form for form in values["added_tokens"] if form["content"] not in texts]
    return Tokenizer.from_str(json.dumps(values))


def _merged(text: str, theirs: Tokenizer, notes: list[str]) -> str:
    """The published tokenizer with the tokens and the splitting of transformers'."""
    published = Tokenizer.from_str(text)
    ours, other = json.loads(published.to_str()), json.loads(theirs.to_str())
    new = [form for form in other["added_tokens"] if published.token_to_id(form["content"]) is None]
    if new:
        tokens = ", ".join(f"{form['content']!r} ({form['id']})" for form in new)
        notes.append(f"tokens that {TOKENIZER_NAME} lacks are taken from the files beside it: {tokens}")
    if any(ours[name] != other[name] for name in _SPLITTING[:2]):
        notes.append(
            f"{SETTINGS_NAME} names a Llama tokenizer, of which transformers takes vocabulary and merges alone: text "
            f"is split as it does (legacy, add_prefix_space), not as {TOKENIZER_NAME} says"
        )
    changed = {name: other[name] for name in (*_SPLITTING, "added_tokens") if ours[name] != other[name]}
    return json.dumps({**ours, **changed}, indent=2, ensure_ascii=False) if changed else text
