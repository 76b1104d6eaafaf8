"""The bytes that every token adds to an answer's text."""

import json
import re
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from tokenizers import Tokenizer

_BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")
_SPECIAL = b"\xff"
"""First byte of tokens that are not text; no UTF-8 text has it."""


def token_bytes(tokenizer: Tokenizer, vocab_size: int, stop_ids: Sequence[int]) -> tuple[list[bytes], list[int]]:
    """The bytes of every token, and the tokens that are not text: special ones, and those that end an answer.

    The bytes are those that the token adds to a text that has begun; empty where they depend on what stands before, so
    that a grammar never allows the token.

    Args:
        tokenizer: the tokenizer of the model.
        vocab_size: number of logits.
        stop_ids: tokens that end an answer.

    Raises:
        ValueError: no token has bytes of its own.
    """
    words = {token: tokenizer.id_to_token(token) for token in range(vocab_size)}
    added = tokenizer.get_added_tokens_decoder()
    not_text = {token for token, form in added.items() if form.special} | {*stop_ids}
    plain = {token: word for token, word in words.items() if word is not None and token not in not_text}
    kinds = set(_decoders(tokenizer))
    if "ByteLevel" in kinds and kinds <= {"ByteLevel", "Strip", "Fuse"}:
        made = {token: _spelled(word) for token, word in plain.items()}
    else:
        made = _decoded(tokenizer, plain, "ByteFallback" in kinds)
    made = {token: value for token, value in made.items() if not value.startswith(_SPECIAL)}
    if not any(made.values()):
        raise ValueError("its tokens have no bytes of their own")
    special = sorted(token for token in not_text if token < vocab_size)
    made |= {token: _SPECIAL + (words[token] or f"<[{token}]>").encode() for token in special}
    return [made.get(token, b"") for token in range(vocab_size)], special


def _decoded(tokenizer: Tokenizer, words: dict[int, str], has_bytes: bool) -> dict[int, bytes]:
    """The bytes of tokens as the decoder shows them after two different words; only where both agree."""
    anchors = [*islice(_anchors(tokenizer, words), 2)]
    if len(anchors) < 2:
        return {}
    texts = [
        (tokenizer.decode([anchor]), tokenizer.decode_batch([[anchor, token] for token in words], False))
        for anchor in anchors
    ]
    made = {}
    for place, (token, word) in enumerate(words.items()):
        match = _BYTE.fullmatch(word) if has_bytes else None
        if match:
            made[token] = bytes.fromhex(match[1])
            continue
        shown = {both[place].removeprefix(before) for before, both in texts if both[place].startswith(before)}
        agrees = len(shown) == 1 and all(both[place].startswith(before) for before, both in texts)
        text = shown.pop() if agrees else ""
        made[token] = b"" if "\ufffd" in text and "\ufffd" not in word else text.encode()
    return made


def _anchors(tokenizer: Tokenizer, words: dict[int, str]) -> Iterator[int]:
    """Tokens that are words of ASCII letters, of different first letters."""
    seen: set[str] = set()
    for token in words:
        text = tokenizer.decode([token]).strip()
        if text.isascii() and text.isalpha() and text[0] not in seen:
            seen.add(text[0])
            yield token


def _decoders(tokenizer: Tokenizer) -> Iterator[str]:
    """The types of a tokenizer's decoders."""

    def walk(form: dict[str, Any]) -> Iterator[str]:
        if form["type"] == "Sequence":
            for part in form["decoders"]:
                yield from walk(part)
        else:
            yield form["type"]

    if tokenizer.decoder is not None:
        yield from walk(json.loads(tokenizer.decoder.__getstate__()))


def _letters() -> dict[str, int]:
    """The byte that each letter stands for in byte-level tokenizers (GPT-2's alphabet)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


_LETTERS = _letters()


def _spelled(word: str) -> bytes:
    """The bytes of a byte-level token; an added token with other letters stands for itself."""
    try:
        return bytes(map(_LETTERS.__getitem__, word))
    except KeyError:
        return word.encode()
