"""A conversation: one slot, its messages, and turns that continue without recomputing the past."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn, Unpack, cast

from melt_runtime.arguments import function_or_none, instance, output_file, path_of
from melt_runtime.engine import Engine
from melt_runtime.execute.slots import Slot
from melt_runtime.hold import Hold
from melt_runtime.memory.plan import StatePlan
from melt_runtime.progress import Progress
from melt_runtime.request.generation_config import GenerationChanges, GenerationConfig
from melt_runtime.request.prompts import Desk, EncodedPrompt, Prompt, as_chat, say, user_message
from melt_runtime.request.request import Request
from melt_runtime.request.result import GenerationResult
from melt_runtime.stream import Ask, GenerationStream, Held, Ticket, Turn
from melt_runtime.text.codec import Message

_BUSY = (
    "this session is at work: a call in another thread, or a stream that has begun and not ended; close it "
    "(session.open_stream.close()), or use a session for each thread: model.new_session()"
)


@dataclass(frozen=True)
class _Kept:
    """What a saved session keeps beside its slot."""

    messages: list[dict[str, Any]]
    holds_raw: bool


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

    def __init__(self, engine: Engine, slot: Slot, desk: Desk, notice: DepthNotice):
        self._engine, self._slot, self._desk, self._notice = engine, slot, desk, notice
        self._hold = Hold(_BUSY)
        self.messages: list[Message] = []
        self._holds_raw = False

    @property
    def plan(self) -> StatePlan:
        """The sizes of the state."""
        return self._desk.plan

    @property
    def state_bytes(self) -> int:
        """Bytes of the whole state; for MELT the same for every number of loops."""
        return self._engine.state_bytes

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Every token so far, prompts and answers."""
        return tuple(self._slot.ids)

    @property
    def open_stream(self) -> Held[Any] | None:
        """The stream that holds the session, where one has begun and not ended."""
        owner = self._hold.owner
        return owner.stream() if isinstance(owner, Ticket) else None

    @property
    def runner(self) -> NoReturn:
        """No longer public.

        Raises:
            AttributeError: names what serves instead.
        """
        raise AttributeError("Session.runner is the session's own now: use model.new_runner()")

    @property
    def state(self) -> NoReturn:
        """No longer public.

        Raises:
            AttributeError: names what serves instead.
        """
        raise AttributeError(
            "Session.state is the session's own now: use session.plan and session.state_bytes, or a state of your own, "
            "model.new_runner().state"
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the conversation, its cache included, to a file; one that exists is replaced in one step.

        Raises:
            BusyError: the session is at work.
            OSError: the file cannot be written.
            ValueError: ``path`` is no path, lies in no folder, or is a folder, a link or a device.
        """
        file = output_file("path", path)
        from melt_runtime.execute.saved import save_slot  # here: what reads it takes longer to import than all else

        more = {"messages": self.messages, "holds_raw": self._holds_raw}
        with self._hold.taken():
            save_slot(file, self._engine.executor.state, self._slot, self._desk.identity, more)

    def restore(self, path: str | os.PathLike[str]) -> None:
        """Makes this the conversation of a file that ``save`` wrote; nothing of it is computed again.

        Raises:
            BusyError: the session is at work.
            SavedError: no such file, one of another model or KV cache, or a damaged one.
            CapacityError: more tokens than the session has room for.
            ValueError: ``path`` is no path. The session is unchanged by any of these.
        """
        file = path_of("path", path, "a file")
        from melt_runtime.execute.saved import load_slot

        with self._hold.taken():
            more = load_slot(file, self._engine.executor.state, self._slot, self._desk.identity, _Kept)
            self.messages, self._holds_raw = cast(list[Message], more.messages), more.holds_raw

    def reset(self) -> None:
        """Forgets the conversation; the memory stays allocated.

        Raises:
            BusyError: the session is at work.
        """
        with self._hold.taken():
            self._forget()

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
        said = say(config, changes)
        instance("raw", raw, bool, "True or False")
        function_or_none("progress", progress)
        self._hold.require_free()
        slot, desk = self._slot, self._desk
        chat = self._as_chat(prompt, raw, fresh)
        if chat is not None:
            ids = desk.encode(chat, is_chat=True)
            chat = [cast(Message, dict(message)) for message in chat]  # the caller may change its own later
        else:
            ids = [*([] if fresh else slot.ids), *desk.encode(prompt, is_chat=False)]
        settings = desk.settle(said, len(ids))
        alone = fresh or (chat is not None and not isinstance(prompt, str))
        goes_on = not alone and slot.continues(ids)
        slot.require_loops(settings.loops, slot.ran if goes_on else 0)
        self._notice(settings.loops)

        def keep(text: str) -> None:
            self._holds_raw = chat is None
            if chat is not None:
                self.messages = [*chat, {"role": "assistant", "content": text}]
            elif fresh:
                self.messages = []

        encoded = EncodedPrompt(ids, continues=chat is None)
        ask = Ask(lambda: Request(encoded, settings, desk.codec), None if alone else slot.turn, fresh, keep, progress)
        return GenerationStream(Turn(self._engine, slot, self._hold, ask))

    def _as_chat(self, prompt: Prompt, raw: bool, fresh: bool) -> list[Message] | None:
        """The whole chat with this turn; None where the prompt is raw text or ids."""
        if not isinstance(prompt, str) or raw or fresh:
            return as_chat(prompt, raw)
        if self._holds_raw:
            raise ValueError("prompt must be raw text or ids until reset(): the session holds such, not a chat")
        return [*self.messages, user_message(prompt)]

    @contextmanager
    def _lent(self, owner: object) -> Iterator[None]:
        """Lends the session's slot to ``owner``, who answers others in it; the conversation is forgotten.

        Raises:
            BusyError: the session is at work.
        """
        slots = self._engine.executor.slots
        try:
            self._hold.take(owner)
            if isinstance(owner, Ticket):
                owner.begun = True
            self._forget()
            slots.release(self._slot)
            yield
        finally:
            try:
                if self._hold.owner is owner:
                    slots.release_all()  # an interrupt may have left some behind
                    self._slot = slots.acquire()
                    self._forget()
            finally:
                self._hold.free(owner)

    def _forget(self) -> None:
        self._slot.forget()
        self.messages = []
        self._holds_raw = False
