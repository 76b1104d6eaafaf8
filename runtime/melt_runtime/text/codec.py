"""Text and chats to token ids and back: tokenizer and chat template. Knows nothing of models."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypedDict

from tokenizers import Encoding, Tokenizer

from melt_runtime.bundle.manifest import CHAT_TEMPLATE_NAME, TOKENIZER_NAME
from melt_runtime.errors import BundleError, CapacityError, TokenError
from melt_runtime.text.control import ControlTokens
from melt_runtime.text.detokenizer import StreamDecoder, refusing
from melt_runtime.text.messages import check_messages, check_tools, require_text
from melt_runtime.text.stops import StopMatcher
from melt_runtime.text.templates import MAX_TEMPLATE_BYTES, ChatEnding, ChatTemplate

CALL_MARKERS = ("<tool_call>", "</tool_call>")
"""What stands around the call of a function in an answer. They are text, also where they are special tokens."""
_CHARACTERS_PER_TOKEN = 64
"""Characters that a token may stand for where the tokenizer sets no bound: some 15 times as many as in most text."""
_MORE_CHARACTERS = 1 << 16
"""Characters that are tokenized beside those, in case they leave no tokens, as spaces may."""
_LONG = 1 << 14
"""Characters, or tokens, from which the tokenizer is called so that other threads go on meanwhile."""


class Message(TypedDict):
    """One turn of a chat."""

    role: str
    content: str


class TextCodec:
    """A bundle's tokenizer and chat template.

    Attributes:
        tokenizer: cuts and pads nothing.
        chat_template: the template's source; None where there is none.
        parse_special: whether the name of a control token in a message becomes that token, as in a raw prompt. False
            unless it is set: whoever writes a message could end it and begin another.
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
        self.parse_special = False
        try:
            self._template = ChatTemplate(chat_template) if chat_template else None
        except BundleError as error:
            raise BundleError(f"{CHAT_TEMPLATE_NAME} is not a template: {error}") from error
        added = tokenizer.get_added_tokens_decoder()
        self._specials = {
            token: form.content
            for token, form in added.items()
            if form.special and form.content and form.content not in CALL_MARKERS
        }

    @classmethod
    def read(cls, folder: Path) -> "TextCodec":
        """Reads ``tokenizer.json`` and ``chat_template.jinja``; an empty template means that there is none.

        Raises:
            BundleError: a file cannot be read.
        """
        with refusing(BundleError, f"{TOKENIZER_NAME} cannot be read"):
            tokenizer = Tokenizer.from_file(str(folder / TOKENIZER_NAME))
        return cls(tokenizer, read_template(folder / CHAT_TEMPLATE_NAME) or None)

    @cached_property
    def _longest(self) -> int:
        """Characters of the longest token; found when a text is long enough."""
        return max(map(len, self.tokenizer.get_vocab(with_added_tokens=True)))

    def require_length(self, text: str, max_tokens: int) -> None:
        """Refuses text that is too long for so many tokens before it is tokenized, which takes seconds for megabytes.

        Raises:
            CapacityError: the text has more characters than that many of the longest token. Where a tokenizer drops
                or joins characters that is no bound: there 64 characters a token, or the longest token's, and 65,536
                more are accepted.
        """
        if len(text) <= max_tokens:
            return
        limit = max_tokens * self._longest
        if not _keeps_all(self.tokenizer):
            limit = max_tokens * max(self._longest, _CHARACTERS_PER_TOKEN) + _MORE_CHARACTERS
        if len(text) > limit:
            raise CapacityError(
                f"{len(text)} characters are more than so many tokens can have, the capacity is {max_tokens}: "
                f"at most {limit} characters are tokenized, shorten the text"
            )

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``; the name of a control token is that token.

        Raises:
            TokenError: empty text, half characters, or text that the tokenizer refuses.
        """
        require_text(text, "the prompt")
        return _some(list(_encode(self.tokenizer, text, with_offsets=False).ids))

    def encode_chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        ending: ChatEnding = "prompt",
        max_tokens: int | None = None,
    ) -> list[int]:
        """Token ids of a chat. Control tokens are those that the template writes; in messages their names are text,
        unless ``parse_special`` is set.

        Args:
            messages: as for ``render``.
            tools: as for ``render``.
            ending: as for ``render``.
            max_tokens: capacity, by which a longer text is refused before it is tokenized; None: without bound.

        Raises:
            CapacityError, TokenError: as for ``require_length``, ``render`` and ``encode``.
        """
        template = self._chat_template()
        checked, functions = self._check(template, messages, tools)
        plain = template.render(checked, functions, ending)
        if max_tokens is not None:
            self.require_length(plain, max_tokens)
        if self.parse_special:
            return self.encode(plain)

        def render(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None) -> str:
            return template.render(messages, tools, ending)

        return _some(self._control.encode(plain, checked, functions, render))

    @cached_property
    def _control(self) -> ControlTokens:
        return ControlTokens(self.tokenizer, self.chat_template or "", CALL_MARKERS, _encode)

    @property
    def takes_tools(self) -> bool:
        """Whether the chat template reads functions that may be called."""
        return self._template is not None and self._template.takes_tools

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        ending: ChatEnding = "prompt",
    ) -> str:
        """The chat as the model was trained to see it.

        Args:
            messages: as ``check_messages`` takes them.
            tools: functions that may be called, as OpenAI writes them; None: none.
            ending: ``prompt``: up to where the answer begins; ``none``: the messages alone; ``continue``: up to the end
                of the last message's text, an assistant's, so that the answer continues it.

        Raises:
            TokenError: no message, one that breaks a rule or that the template refuses, or no template at all.
        """
        template = self._chat_template()
        return template.render(*self._check(template, messages, tools), ending)

    def _chat_template(self) -> ChatTemplate:
        if self._template is None:
            raise TokenError("this bundle has no chat template: pass raw=True to give the text as it is")
        return self._template

    def _check(
        self, template: ChatTemplate, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
        return check_messages(messages, template.takes_parts), None if tools is None else check_tools(tools)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of all tokens, special ones by their names."""
        with refusing(TokenError, "the tokenizer cannot decode its tokens"):
            if len(ids) < _LONG:
                text: str = self.tokenizer.decode(ids, skip_special_tokens=False)
                return text
            texts: list[str] = self.tokenizer.decode_batch([ids], skip_special_tokens=False)
            return texts[0]

    def stream(self, context: Sequence[int] = ()) -> StreamDecoder:
        """A decoder for one answer, which follows the tokens of ``context``."""
        return StreamDecoder(self.tokenizer, self._specials.keys(), context)

    def special_name(self, token: int) -> str | None:
        """The name of a special token, which is no part of an answer's text; None for other tokens."""
        return self._specials.get(token)

    def special_stops(self, stops: Sequence[str]) -> StopMatcher:
        """A matcher of those stop strings that hold the name of a special token, over text with these names."""
        return StopMatcher([stop for stop in stops if any(name in stop for name in self._specials.values())])


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


def _keeps_all(tokenizer: Tokenizer) -> bool:
    """Whether every character of a text stands in its tokens: nothing is normalized, or left out between words."""
    how = repr(tokenizer.pre_tokenizer)
    drops = any(word in how for word in ("Removed", "Whitespace", "BertPreTokenizer"))
    return tokenizer.normalizer is None and "ByteLevel" in how and not drops


def _encode(tokenizer: Tokenizer, text: str, with_offsets: bool = True) -> Encoding:
    """Tokenizes text as it is; a long one without holding the interpreter's lock, as only batches do."""
    with refusing(TokenError, "the tokenizer refuses the prompt"):
        if len(text) < _LONG:
            return tokenizer.encode(text, add_special_tokens=False)
        encode = tokenizer.encode_batch if with_offsets else tokenizer.encode_batch_fast
        return encode([text], add_special_tokens=False)[0]


def _some(ids: list[int]) -> list[int]:
    """The ids themselves.

    Raises:
        TokenError: there are none.
    """
    if not ids:
        raise TokenError("the prompt is empty: give at least one character")
    return ids
