"""Token ids to text, one token at a time. Knows nothing of stop strings and chat templates."""

import codecs
import json
import re
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from itertools import islice
from typing import Any

from tokenizers import Tokenizer

from melt_runtime.errors import MeltError, TokenError

_BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")
"""A token that is one byte of a character, in tokenizers with byte fallback."""
_ESCAPED = re.compile("[\udc80-\udcff]")
_CONTEXT = 8
"""Tokens of the prompt that are decoded before an answer: more than the bytes of a character."""


@contextmanager
def refusing(kind: type[MeltError], what: str) -> Iterator[None]:
    """Converts what tokenizers raises, plain exceptions and panics (which are no ``Exception``), to one error.

    Raises:
        MeltError: of the given kind.
    """
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise kind(f"{what}: {error}") from error
        raise


class StreamDecoder:
    """Decodes an answer token by token; holds back bytes that may still become a character.

    The pieces together are what the tokenizer makes of all tokens at once, special tokens left out, with two
    exceptions: after a context, the first token keeps its leading space; and of a run of byte tokens only the bytes
    that belong to no character become U+FFFD, where the tokenizer would replace the whole run.

    Attributes:
        added: bytes that the last token added to the text, before any was held back; empty for a special token.
    """

    def __init__(self, tokenizer: Tokenizer, specials: Set[int], context: Sequence[int] = ()):
        """Starts after the tokens of ``context``, whose text is not shown.

        Args:
            tokenizer: the tokenizer of the model.
            specials: ids of special tokens, which have no text.
            context: tokens before the answer.
        """
        self._tokenizer, self._specials = tokenizer, specials
        forms = _decoders(tokenizer)
        kinds = [form["type"] for form in forms]
        self._is_byte_level = kinds[:1] == ["ByteLevel"] and all(_strips_start(form) for form in forms[1:])
        self._mixes_bytes = "ByteLevel" in kinds  # text that ends in U+FFFD may still become a character
        self._has_bytes = "ByteFallback" in kinds
        self._strips = [(form["content"].encode(), form["start"]) for form in forms[1:] if self._is_byte_level]
        # As the tokenizer does: a replacement character for each stray byte with byte fallback, else for each run.
        self._utf8 = codecs.getincrementaldecoder("utf-8")("surrogateescape" if self._has_bytes else "replace")
        self.added = b""
        self._restart()
        shown = (token for token in reversed(context) if token not in specials)
        for token in reversed([*islice(shown, _CONTEXT)]):
            self.push(token)
        self._begun = self._utf8.getstate()[0]

    def _restart(self) -> None:
        self._begun = b""  # bytes of the context that the answer may complete to a character
        # The text of a token depends on its neighbours: the tokens shown last are decoded again with those held back.
        self._shown: list[int] = []
        self._held: list[int] = []
        self._before = ""  # text of the shown ones
        self._strip = [letter for letter, count in self._strips for _ in range(count)]  # from the text's beginning
        self._utf8.reset()

    def peek(self, token: int) -> bytes:
        """Bytes that this token would add to the text here."""
        word = self._tokenizer.id_to_token(token)
        if word is None or token in self._specials:
            return b""
        if self._is_byte_level:
            return self._stripped(_spelled(word))[0]
        if byte := self._byte(word):
            # At the beginning of a text some decoders leave a space out.
            return byte if self._shown or self._decode([*self._held, token]) else b""
        text = self._decode([*self._shown, *self._held, token])
        if not text.startswith(self._before) or (self._mixes_bytes and text.endswith("\ufffd")):
            return b""
        return text[len(self._before) :].encode()

    def push(self, token: int) -> str:
        """Text that is complete with this token: often one token's, sometimes none."""
        self.added = self.peek(token)
        word = self._tokenizer.id_to_token(token)
        if word is None or token in self._specials:
            return ""
        if self._is_byte_level:
            self._strip = self._stripped(_spelled(word))[1]
        elif not (self._byte(word) and self._shown):
            self._held.append(token)
            if self.added or self._byte(word):
                self._shown, self._held = self._held, []
                self._before = self._decode(self._shown)
        return self._text(self.added)

    def flush(self) -> str:
        """The text held back, when no more tokens come: bytes that form no character show as U+FFFD."""
        held = self._decode([*self._shown, *self._held])[len(self._before) :] if self._held else ""
        text = self._text(held.encode(), is_last=True)
        self._restart()
        return text

    def _stripped(self, added: bytes) -> tuple[bytes, list[bytes]]:
        """Bytes without those that are left out at the text's beginning, and what is still to be left out."""
        strip = self._strip
        while strip and added:
            if added.startswith(strip[0]):
                added, strip = added[len(strip[0]) :], strip[1:]
            else:
                strip = [letter for letter in strip if letter != strip[0]]
        return added, strip

    def _byte(self, word: str) -> bytes:
        match = _BYTE.fullmatch(word) if self._has_bytes else None
        return bytes.fromhex(match[1]) if match else b""

    def _text(self, added: bytes, is_last: bool = False) -> str:
        is_first = self._begun == self._utf8.getstate()[0]
        if self._begun and is_first and (added or is_last) and not _continues(self._begun, added[:1]):
            self._utf8.reset()  # they belong to no character, and are not the answer's
            self._begun = b""
        text = self._utf8.decode(added, is_last)
        if text and self._begun:
            text = text.removeprefix(self._begun.decode("utf-8", "surrogateescape"))
            self._begun = b""
        return _ESCAPED.sub("\ufffd", text)

    def _decode(self, tokens: Sequence[int]) -> str:
        with refusing(TokenError, "the tokenizer cannot decode its tokens"):
            text: str = self._tokenizer.decode(tokens, skip_special_tokens=False)  # those without text are left out
        return text


def _decoders(tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """A tokenizer's decoders, in their order, as its file describes them."""

    def walk(form: dict[str, Any]) -> Iterator[dict[str, Any]]:
        if form["type"] == "Sequence":
            for part in form["decoders"]:
                yield from walk(part)
        else:
            yield form

    return [] if tokenizer.decoder is None else [*walk(json.loads(tokenizer.decoder.__getstate__()))]


def _strips_start(form: dict[str, Any]) -> bool:
    return form["type"] == "Strip" and not form["stop"]


def _continues(begun: bytes, added: bytes) -> bool:
    """Whether a byte may follow those of a character that is not whole."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(begun + added)
    except UnicodeDecodeError:
        return False
    return bool(added)


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
