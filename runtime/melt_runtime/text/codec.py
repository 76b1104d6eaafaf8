"""Token ids to text and back: tokenizer, chat template, streaming decoder, stop strings. Knows nothing of models."""

import re
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, TypedDict

from tokenizers import Tokenizer

from melt_runtime.bundle.manifest import CHAT_TEMPLATE_NAME, TOKENIZER_NAME
from melt_runtime.errors import BundleError, CapacityError, MeltError, TokenError
from melt_runtime.text.messages import check_messages, check_tools, require_text
from melt_runtime.text.templates import MAX_TEMPLATE_BYTES, ChatTemplate


class Message(TypedDict):
    """One turn of a chat."""

    role: str
    content: str


class TextCodec:
    """A bundle's tokenizer and chat template.

    Attributes:
        tokenizer: cuts and pads nothing.
        chat_template: the template's source; None where there is none.
    """

    def __init__(self, tokenizer: Tokenizer, chat_template: str | None):
        """Switches truncation and padding of the tokenizer off: they would change prompts without a word.

        Raises:
            BundleError: the template cannot be compiled.
        """
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        try:
            self._template = ChatTemplate(chat_template) if chat_template else None
        except BundleError as error:
            raise BundleError(f"{CHAT_TEMPLATE_NAME} is not a template: {error}") from error
        added = tokenizer.get_added_tokens_decoder()
        self._specials = frozenset(token for token, form in added.items() if form.special)

    @classmethod
    def read(cls, folder: Path) -> "TextCodec":
        """Reads ``tokenizer.json`` and ``chat_template.jinja``; an empty template means that there is none.

        Raises:
            BundleError: a file cannot be read.
        """
        with _refusing(BundleError, f"{TOKENIZER_NAME} cannot be read"):
            tokenizer = Tokenizer.from_file(str(folder / TOKENIZER_NAME))
        return cls(tokenizer, read_template(folder / CHAT_TEMPLATE_NAME) or None)

    @cached_property
    def _longest(self) -> int:
        """Characters of the longest token; 0 where characters may have none. Found when a text is long enough."""
        tokenizer = self.tokenizer
        return max(map(len, tokenizer.get_vocab(with_added_tokens=True))) if _keeps_all(tokenizer) else 0

    def require_length(self, text: str, most_tokens: int) -> None:
        """Refuses text that cannot be so few tokens, before it is tokenized, which takes its time for a long one.

        Raises:
            CapacityError: it has more characters than so many of the longest token.
        """
        if len(text) > most_tokens and self._longest and len(text) > most_tokens * self._longest:
            raise CapacityError(
                f"{len(text)} characters are more than so many tokens can have, the capacity is {most_tokens}: "
                "shorten the text"
            )

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``.

        Raises:
            TokenError: empty text, half characters, or text that the tokenizer refuses.
        """
        require_text(text, "the prompt")
        with _refusing(TokenError, "the tokenizer refuses the prompt"):
            ids = list(self.tokenizer.encode(text, add_special_tokens=False).ids)
        if not ids:
            raise TokenError("the prompt is empty: give at least one character")
        return ids

    @property
    def takes_tools(self) -> bool:
        """Whether the chat template reads functions that may be called."""
        return self._template is not None and self._template.takes_tools

    def render(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None) -> str:
        """The chat as the model was trained to see it, up to where the answer begins.

        Args:
            messages: as ``check_messages`` takes them.
            tools: functions that may be called, as OpenAI writes them; None: none.

        Raises:
            TokenError: no message, one that breaks a rule or that the template refuses, or no template at all.
        """
        if self._template is None:
            raise TokenError("this bundle has no chat template: pass raw=True to give the text as it is")
        checked = check_messages(messages, self._template.takes_parts)
        return self._template.render(checked, None if tools is None else check_tools(tools))

    def stream(self) -> "StreamDecoder":
        """A decoder for one answer."""
        return StreamDecoder(self.tokenizer, self._specials)


def read_template(path: Path) -> str:
    """The text of a chat template's file.

    Raises:
        BundleError: it cannot be read, is too large, or is not UTF-8.
    """
    try:
        if path.stat().st_size > MAX_TEMPLATE_BYTES:
            raise BundleError(f"{path} must be at most {MAX_TEMPLATE_BYTES} bytes, got {path.stat().st_size}")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(f"{path} cannot be read: {error}") from error


@contextmanager
def _refusing(kind: type[MeltError], what: str) -> Iterator[None]:
    """Makes ours of what tokenizers raises: plain exceptions, and panics, which are not even those.

    Raises:
        MeltError: of the kind that is given.
    """
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise kind(f"{what}: {error}") from error
        raise


def _keeps_all(tokenizer: Tokenizer) -> bool:
    """Whether every character of a text stands in its tokens: nothing is normalized, or left out between words."""
    how = repr(tokenizer.pre_tokenizer)
    drops = any(word in how for word in ("Removed", "Whitespace", "BertPreTokenizer"))
    return tokenizer.normalizer is None and "ByteLevel" in how and not drops


class StreamDecoder:
    """Token by token to text; holds back what may still be half a character.

    Together the pieces are what the tokenizer makes of all tokens at once, special tokens left out.
    """

    def __init__(self, tokenizer: Tokenizer, specials: Set[int]):
        self._tokenizer, self._specials = tokenizer, specials
        # Text of a token depends on its neighbours: the tokens last shown are decoded again with those held back.
        self._shown: list[int] = []
        self._held: list[int] = []
        self._before = ""  # text of the shown ones

    def push(self, token: int) -> str:
        """Text that is complete with this token, often one token's, sometimes none."""
        word = self._tokenizer.id_to_token(token)
        if word is None or token in self._specials:
            return ""
        self._held.append(token)
        if _BYTE.fullmatch(word):  # the next byte decides what the bytes before are
            return ""
        text, before = self._decode(self._shown + self._held), self._before
        if text.endswith("\ufffd") or not text.startswith(before) or text == before:
            return ""
        self._shown, self._held = self._held, []
        self._before = self._decode(self._shown)
        return text[len(before) :]

    def flush(self) -> str:
        """What was held back, when no more tokens come: characters that never became whole show as U+FFFD."""
        text, before = self._decode(self._shown + self._held), self._before
        self._shown, self._held, self._before = [], [], ""
        return text[len(before) :]

    def _decode(self, tokens: list[int]) -> str:
        with _refusing(TokenError, "the tokenizer cannot show its tokens"):
            text: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return text


_BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")
"""A token that is one byte of a character, in tokenizers with such a fallback."""


class StopMatcher:
    """Finds stop strings in streamed text, also across pieces; holds back what may become one."""

    def __init__(self, stops: Sequence[str]):
        self._stops = stops
        self._held = ""
        self.found: str | None = None

    def push(self, piece: str) -> str:
        """Text that is safe to show; after ``found`` is set, nothing more comes."""
        text = self._held + piece
        hits = [(text.index(stop), stop) for stop in self._stops if stop in text]
        if hits:
            place, self.found = min(hits)
            self._held = ""
            return text[:place]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop``."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
