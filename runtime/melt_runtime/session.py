"""A conversation: one state, its token history, and turns that continue without recomputing the past."""

import warnings
from collections.abc import Mapping, Sequence
from typing import NoReturn, Unpack, cast
from weakref import ReferenceType

import numpy as np

from melt_runtime.arguments import function_or_none, instance, shown
from melt_runtime.errors import TokenError
from melt_runtime.generate import GenerationResult, GenerationStream, Request, Turn
from melt_runtime.history import TokenHistory
from melt_runtime.hold import Hold
from melt_runtime.loop import LoopRunner, Progress, Sessions, check_ids
from melt_runtime.memory.plan import StatePlan
from melt_runtime.request.generation_config import GenerationChanges, GenerationConfig, settle
from melt_runtime.state import State
from melt_runtime.text.codec import Message, TextCodec

Prompt = str | Sequence[Message] | Sequence[int]
"""A user's message (or plain text with ``raw``), a whole chat, or token ids."""

_BUSY = (
    "this session is at work: a call in another thread, or a stream that has begun and not ended; close it "
    "(session.open_stream.close()), or use a session for each thread: model.new_session()"
)


class DepthNotice:
    """Warns once of a depth that the model was not trained with; the sessions of a model share one."""

    def __init__(self, trained_loops: int):
        self._trained_loops = trained_loops
        self._given = False

    def __call__(self, loops: int) -> None:
        """Warns where ``loops`` are more than those trained."""
        if loops > self._trained_loops and not self._given:
            self._given = True
            warnings.warn(
                f"loops={loops} is deeper than the {self._trained_loops} loops that this model was trained with: "
                "answers get worse there, often quickly",
                RuntimeWarning,
                stacklevel=4,
            )


class Session:
    """Turns of one conversation over a state of its own; one call at a time, another is refused with ``BusyError``.

    A turn that continues the conversation (text, a message, or ids after all that was said) is run as chunks of its new
    tokens after everything before. Where a prompt replaces what was said, a list of messages always does, its numbers
    are those of a fresh session: the cache is kept only as far as it holds the same tokens, in the same chunks, at the
    same depth.

    Attributes:
        messages: the chat so far, answers included; empty where raw text or ids were given.
    """

    def __init__(
        self, sessions: Sessions, state: State, codec: TextCodec, defaults: GenerationConfig, notice: DepthNotice
    ):
        self._runner = LoopRunner(sessions, state)
        self._codec = codec
        self._defaults = defaults
        self._notice = notice
        self._history = TokenHistory(self._runner)
        self._hold = Hold(_BUSY)
        self.messages: list[Message] = []
        self._holds_raw = False

    @property
    def plan(self) -> StatePlan:
        """The sizes of the state."""
        return self._runner.state.plan

    @property
    def state_bytes(self) -> int:
        """Bytes of the whole state; for MELT the same for every number of loops."""
        return self._runner.state.nbytes

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Every token so far, prompts and answers."""
        return tuple(self._history.ids)

    @property
    def open_stream(self) -> GenerationStream | None:
        """The stream that holds the session, where one has begun and not ended."""
        owner = self._hold.owner
        return owner() if isinstance(owner, ReferenceType) else None

    @property
    def runner(self) -> NoReturn:
        """No longer public.

        Raises:
            AttributeError: names what serves instead.
        """
        raise AttributeError("Session.runner is Session._runner now, the session's own: use model.new_runner()")

    @property
    def state(self) -> NoReturn:
        """No longer public.

        Raises:
            AttributeError: names what serves instead.
        """
        raise AttributeError(
            "Session.state is Session._runner.state now, the session's own: use session.plan and session.state_bytes, "
            "or a state of your own, model.new_runner().state"
        )

    def reset(self) -> None:
        """Forgets the conversation; the memory stays allocated.

        Raises:
            BusyError: the session is at work.
        """
        with self._hold.taken():
            self._history.forget()
            self.messages = []
            self._holds_raw = False

    def stream(
        self,
        prompt: Prompt,
        config: GenerationConfig | None = None,
        raw: bool = False,
        progress: Progress | None = None,
        **changes: Unpack[GenerationChanges],
    ) -> GenerationStream:
        """The next turn; iterate the result for pieces of text. Nothing moves before the first is asked for.

        Args:
            prompt: a user's message, put into the bundle's chat template after the turns before; a list of messages,
                which replaces the chat; token ids, or text with ``raw``, which are appended as they are.
            config: what it does not say, the bundle says.
            raw: give a string to the model as it is.
            progress: called with the tokens done and all of them after every chunk of the prompt.
            **changes: single fields of ``GenerationConfig``, e.g. ``loops=2``, over ``config``.

        Raises:
            TokenError: an empty prompt, ids outside the vocabulary, or messages that the template refuses.
            CapacityError: prompt and ``max_new_tokens`` do not fit.
            BusyError: the session is at work.
            ValueError: an argument outside its rule; a depth that the state cannot run; or a user's message after raw
                text or ids, which it would drop. The session is unchanged by any of these.
        """
        return self._stream(prompt, config, raw, progress, changes, fresh=False)

    def generate(
        self,
        prompt: Prompt,
        config: GenerationConfig | None = None,
        raw: bool = False,
        progress: Progress | None = None,
        **changes: Unpack[GenerationChanges],
    ) -> GenerationResult:
        """Runs the next turn to its end; arguments and errors as for ``stream``."""
        return self._stream(prompt, config, raw, progress, changes, fresh=False).run_to_end()

    def _stream(
        self,
        prompt: Prompt,
        config: GenerationConfig | None,
        raw: bool,
        progress: Progress | None,
        changes: GenerationChanges,
        fresh: bool,
    ) -> GenerationStream:
        """As ``stream``; ``fresh``: as the first turn of an empty session, which it then replaces."""
        config = GenerationConfig() if config is None else config
        instance("config", config, GenerationConfig, "a GenerationConfig")
        instance("raw", raw, bool, "True or False")
        function_or_none("progress", progress)
        said = config.with_changes(**changes)
        self._hold.require_free()
        shape, history = self.plan.shape, self._history
        chat = self._as_chat(prompt, raw, fresh)
        if chat is not None:
            ids = self._codec.encode(self._codec.render(chat))
            chat = [cast(Message, dict(message)) for message in chat]  # the caller may change its own later
        else:
            more = self._codec.encode(prompt) if isinstance(prompt, str) else cast(Sequence[int], prompt)
            ids = [*([] if fresh else history.ids), *check_ids(more, shape).tolist()]
        settings = settle(said, self._defaults, shape.trained_loops, self.plan.capacity - len(ids) + 1)
        # The last new token is never run, so it takes no row.
        self._runner.state.require_total(len(ids) + max(settings.max_new_tokens, 1) - 1)
        alone = fresh or (chat is not None and not isinstance(prompt, str))
        goes_on = not alone and history.continues(ids)
        self._runner.state.require_loops(settings.loops, history.cached if goes_on else 0)
        unknown = [token for token in said.stop_ids or () if token >= shape.vocab_size]
        if unknown:
            raise ValueError(f"stop_ids must be below the vocabulary's {shape.vocab_size}, got {unknown[:8]}")
        self._notice(settings.loops)

        def keep(text: str) -> None:
            self._holds_raw = chat is None
            if chat is not None:
                self.messages = [*chat, {"role": "assistant", "content": text}]
            elif fresh:
                self.messages = []

        request = Request(ids, settings, None if alone else history.turn, fresh, keep, progress)
        return GenerationStream(Turn(self._runner, self._codec, history, self._hold, request))

    def _as_chat(self, prompt: Prompt, raw: bool, fresh: bool) -> list[Message] | None:
        """The whole chat with this turn; None where the prompt is raw text or ids."""
        if isinstance(prompt, str):
            if raw:
                return None
            if fresh:
                return [{"role": "user", "content": prompt}]
            if self._holds_raw:
                raise ValueError("prompt must be raw text or ids until reset(): the session holds such, not a chat")
            return [*self.messages, {"role": "user", "content": prompt}]
        if isinstance(prompt, np.ndarray):
            return None
        if isinstance(prompt, bytes | bytearray | memoryview) or not isinstance(prompt, Sequence):
            raise ValueError(f"prompt must be text, messages or token ids, got {shown(prompt)}")
        if not prompt:
            raise TokenError("prompt must hold at least one message or token id")
        if isinstance(prompt[0], Mapping):
            return list(cast(Sequence[Message], prompt))
        return None
