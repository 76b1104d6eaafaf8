"""Token ids to text and back: tokenizer, chat template, streaming decoder, stop strings. Knows nothing of models."""

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, TypedDict

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from melt_runtime.errors import BundleError, TokenError
from melt_runtime.manifest import CHAT_TEMPLATE_NAME, TOKENIZER_NAME


class Message(TypedDict):
    """One turn of a chat."""

    role: str
    content: str


class TextCodec:
    """A bundle's tokenizer and chat template."""

    def __init__(self, tokenizer: Tokenizer, chat_template: str | None):
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        # What transformers offers to chat templates.
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            self._template = environment.from_string(chat_template) if chat_template else None
        except jinja2.TemplateError as error:
            raise BundleError(f"{CHAT_TEMPLATE_NAME} is not a template: {error}") from error

    @classmethod
    def read(cls, folder: Path) -> "TextCodec":
        """Reads ``tokenizer.json`` and ``chat_template.jinja``; an empty template means that there is none.

        Raises:
            BundleError: a file cannot be read.
        """
        try:
            tokenizer = Tokenizer.from_file(str(folder / TOKENIZER_NAME))
        except Exception as error:  # tokenizers raises plain Exception
            raise BundleError(f"{TOKENIZER_NAME} cannot be read: {error}") from error
        return cls(tokenizer, (folder / CHAT_TEMPLATE_NAME).read_text(encoding="utf-8") or None)

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``.

        Raises:
            TokenError: empty text.
        """
        ids = list(self.tokenizer.encode(text, add_special_tokens=False).ids)
        if not ids:
            raise TokenError("the prompt is empty: give at least one character")
        return ids

    def render(self, messages: Sequence[Message]) -> str:
        """The chat as the model was trained to see it, up to where the answer begins.

        Raises:
            TokenError: no message, an empty one of the user's, a role unknown to the template, or no template at all.
        """
        if self._template is None:
            raise TokenError("this bundle has no chat template: pass raw=True to give the text as it is")
        if not messages:
            raise TokenError("messages must hold at least one message")
        for number, message in enumerate(messages):
            if message["role"] == "user" and not message["content"].strip():
                raise TokenError(f"messages[{number}]: the content is empty")
        try:
            return self._template.render(messages=messages, add_generation_prompt=True, tools=None, documents=None)
        except jinja2.TemplateError as error:
            raise TokenError(f"the chat template refuses these messages: {error}") from error

    def stream(self) -> "StreamDecoder":
        """A decoder for one answer."""
        return StreamDecoder(self.tokenizer)


class StreamDecoder:
    """Token by token to text; holds back what may still be half a character."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)

    def push(self, token: int) -> str:
        """Text that is complete with this token, often one token's, sometimes none."""
        return self._stream.step(self._tokenizer, token) or ""


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


def _raise(message: str) -> Any:
    raise jinja2.TemplateError(message)
