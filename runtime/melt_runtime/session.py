"""A conversation: one state, its token history, and turns that continue without recomputing the past."""

from collections.abc import Sequence
from typing import Any

from melt_runtime.generate import GenerationResult, GenerationStream, TokenHistory
from melt_runtime.generation_config import GenerationConfig
from melt_runtime.loop import LoopRunner, Sessions
from melt_runtime.state import State
from melt_runtime.text import Message, TextCodec

Prompt = str | Sequence[Message] | Sequence[int]
"""A user's message (or plain text with ``raw``), a whole chat, or token ids."""


class Session:
    """Turns of one conversation over a state of its own.

    What the cache already holds is not computed again: the longest prefix that the new prompt shares with it is kept.

    Attributes:
        runner: the driver, for applications that handle token ids and logits themselves.
        messages: the chat so far, answers included; empty where raw text or ids were given.
    """

    def __init__(self, sessions: Sessions, state: State, codec: TextCodec, defaults: GenerationConfig):
        self.runner = LoopRunner(sessions, state)
        self._codec = codec
        self._defaults = defaults
        self._history = TokenHistory(self.runner)
        self.messages: list[Message] = []
        self._holds_raw = False

    @property
    def state(self) -> State:
        """The buffers, with their sizes and lengths."""
        return self.runner.state

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Every token so far, prompts and answers."""
        return tuple(self._history.ids)

    def reset(self) -> None:
        """Forgets the conversation; the memory stays allocated."""
        self.state.reset()
        self._history.become([], 0)
        self.messages = []
        self._holds_raw = False

    def stream(
        self, prompt: Prompt, config: GenerationConfig | None = None, raw: bool = False, **changes: Any
    ) -> GenerationStream:
        """Starts the next turn; iterate the result for pieces of text.

        Args:
            prompt: a user's message, put into the bundle's chat template after the turns before; a list of messages,
                which replaces the chat; token ids, or text with ``raw``, which are appended as they are.
            config: default: the bundle's.
            raw: give a string to the model as it is.
            **changes: single fields of ``GenerationConfig``, e.g. ``loops=2``.

        Raises:
            TokenError, CapacityError, ValueError: as for ``GenerationStream``, or a user's message after raw text or
                ids, which it would drop; the session is unchanged then.
        """
        settings = (self._defaults if config is None else config).with_changes(**changes)
        chat = self._as_chat(prompt, raw)
        if chat is None:
            more = self._codec.encode(prompt) if isinstance(prompt, str) else list(prompt)
            ids = [*self._history.ids, *more] if more else []
        else:
            ids = self._codec.encode(self._codec.render(chat))

        def keep_chat(result: GenerationResult) -> None:
            if chat is not None:
                self.messages = [*chat, {"role": "assistant", "content": result.text}]

        stream = GenerationStream(self.runner, self._codec, self._history, ids, settings, keep_chat)
        self._holds_raw = chat is None
        return stream

    def generate(
        self, prompt: Prompt, config: GenerationConfig | None = None, raw: bool = False, **changes: Any
    ) -> GenerationResult:
        """Runs the next turn to its end; arguments and errors as for ``stream``."""
        stream = self.stream(prompt, config, raw, **changes)
        for _ in stream:
            pass
        return stream.result

    def _as_chat(self, prompt: Prompt, raw: bool) -> list[Message] | None:
        """The whole chat with this turn; None where the prompt is raw text or ids."""
        if isinstance(prompt, str):
            if raw:
                return None
            if self._holds_raw:
                raise ValueError("prompt must be raw text or ids until reset(): the session holds such, not a chat")
            return [*self.messages, {"role": "user", "content": prompt}]
        if len(prompt) and isinstance(prompt[0], dict):
            return list(prompt)  # type: ignore[arg-type]
        return None
