"""The choices of one request, as they come from the service's thread to a handler of the event loop."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field

from melt_runtime.asynchronous import submitted
from melt_runtime.reply import Part, Reply, Submission
from melt_runtime.request.logprobs import TokenLogprob
from melt_runtime.request.request import Request
from melt_runtime.request.result import GenerationResult
from melt_runtime.serve.asks import Ask
from melt_runtime.serve.errors import Fault, FaultError, FieldError
from melt_runtime.service import Service

MAX_TOKEN_LOOPS = 1 << 19
"""Maximum number of loops of all tokens of one request, prompts and answers; one answer at trained depth fits."""
MAX_LOGPROBS = 1 << 17
"""Maximum number of log probabilities of one request, of tokens and their alternatives."""
_LOGPROBS_AT_ONCE = 512
"""Maximum number in one event: the event loop builds it while others wait."""

Ended = Callable[[Reply, float | None], None]
"""Told of each answer that ended, and when its first token came, in ``time.monotonic()``."""


@dataclass
class _Pending:
    """What came of a choice and was not taken yet: a client that reads slowly gets it in fewer, larger parts."""

    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    loops: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    reply: Reply | None = None
    first_token_at: float | None = None

    def add(self, part: Part) -> None:
        self.texts.append(part.text)
        self.token_ids += part.token_ids
        self.loops += part.loops
        self.logprobs += part.logprobs

    def take(self) -> Part | None:
        """A part of it, or None where nothing is left; text goes with the first tokens."""
        if not self.texts:
            return None
        each = 1 + max((len(one.top) for one in self.logprobs[:1]), default=0)
        count = max(1, _LOGPROBS_AT_ONCE // each) if self.logprobs else len(self.token_ids)
        part = Part(
            "".join(self.texts), tuple(self.token_ids[:count]), tuple(self.loops[:count]), tuple(self.logprobs[:count])
        )
        del self.token_ids[:count], self.loops[:count], self.logprobs[:count]
        self.texts = [""] if self.token_ids else []
        return part


@dataclass(frozen=True)
class RequestLimits:
    """Limits of one request, all its answers together.

    Attributes:
        seconds: time limit, waiting included.
        token_loops: maximum number of loops of all tokens, prompts and answers.
        max_loops: largest depth; None: that of the service.
    """

    seconds: float
    token_loops: int
    max_loops: int | None = None

    def prepare(self, service: Service, ask: Ask) -> Request:
        """A checked request; one that names no depth gets the largest that is allowed, where its own would be larger.

        Raises:
            CapacityError, ValueError: as for ``Service.prepare``.
        """
        config = ask.config
        request = service.prepare(ask.prompt, config, ask.defaults)
        if self.max_loops is None or request.settings.loops <= self.max_loops or config.max_loops is not None:
            return request
        if config.loops is None:
            return service.prepare(ask.prompt, config.with_changes(loops=self.max_loops), ask.defaults)
        if config.loops == "auto":
            return service.prepare(ask.prompt, config.with_changes(max_loops=self.max_loops), ask.defaults)
        return request

    def require(self, requests: Sequence[Request]) -> None:
        """Refuses what one request may not ask for, however many prompts and choices it is made of.

        Raises:
            ValueError: it is deeper than is allowed, or asks for too much.
        """
        settings = [request.settings for request in requests]
        deepest = max(one.loops for one in settings)
        if self.max_loops is not None and deepest > self.max_loops:
            raise ValueError(f"loops must be at most {self.max_loops} on this server, got {deepest}")
        loops = sum((len(one.prompt) + one.settings.max_new_tokens) * one.settings.loops for one in requests)
        if loops > self.token_loops:
            raise FieldError(
                "max_tokens",
                f"tokens times loops of all prompts and answers of a request must be at most {self.token_loops}, got "
                f"{loops}: lower n, max_tokens or loops, or send fewer prompts",
            )
        logprobs = sum(one.max_new_tokens * (1 + one.logprobs) for one in settings if one.logprobs is not None)
        if logprobs > MAX_LOGPROBS:
            raise ValueError(
                f"logprobs of all tokens of a request must be at most {MAX_LOGPROBS}, got {logprobs}: lower n, "
                "max_tokens or the number of logprobs, or send fewer prompts"
            )


async def submit(service: Service, asks: Sequence[Ask], limits: RequestLimits, on_end: Ended) -> "Choices":
    """Submits all answers of a request, or none.

    Args:
        service: what answers.
        asks: the answers.
        limits: of the request.
        on_end: called in the event loop once for each answer, however it ends.

    Raises:
        QueueError, TokenError, CapacityError, ValueError: of any of them, or they are too much together.
    """
    choices = Choices(len(asks), limits, on_end)
    try:
        await submitted(lambda: choices.submit(service, asks), lambda _: choices.cancel())
    except BaseException:
        choices.stop_clock()
        raise
    return choices


class Choices:
    """Answers under way.

    Attributes:
        replies: of each choice.
    """

    def __init__(self, count: int, limits: RequestLimits, on_end: Ended):
        self.replies: list[Reply] = []
        self._loop = asyncio.get_running_loop()
        self._pending = [_Pending() for _ in range(count)]
        self._changed: dict[int, None] = {}  # choices of which something came, the first of them first
        self._is_changed = asyncio.Event()
        self._limits, self._is_late = limits, False
        self._left = count
        self._on_end = on_end
        # Not a timeout of whoever follows: that one may be waiting for a client that reads nothing.
        self._clock = self._loop.call_later(limits.seconds, self._end_late)

    def submit(self, service: Service, asks: Sequence[Ask]) -> None:
        """Submits every answer; in any thread. Errors as for the function ``submit``."""
        requests = [self._limits.prepare(service, ask) for ask in asks]
        self._limits.require(requests)
        submissions = [
            Submission(request, self._push_to(index), self._end_to(index)) for index, request in enumerate(requests)
        ]
        self.replies = service.submit_all(submissions)
        if self._is_late:
            self.cancel()

    def cancel(self) -> None:
        """Ends all that are under way."""
        for reply in self.replies:
            reply.cancel()

    def stop_clock(self) -> None:
        """Ends the time limit: nothing is under way."""
        self._clock.cancel()

    async def follow(self) -> AsyncGenerator[tuple[int, Part | GenerationResult], None]:
        """(choice, what came of it) until all have ended; left early, they are cancelled.

        Raises:
            FaultError: they took more time than they have.
            Exception: what ended one of them before its end.
        """
        left = len(self._pending)
        try:
            while left:
                await self._is_changed.wait()
                if self._is_late:
                    message = f"the answer took more than {self._limits.seconds:g} s"
                    raise FaultError(Fault(504, message, "server_error", code="timeout"))
                index = next(iter(self._changed))
                del self._changed[index]
                pending = self._pending[index]
                part = pending.take()
                if part is not None:
                    if pending.texts or pending.reply is not None:
                        self._changed[index] = None
                    self._note()
                    yield index, part
                elif pending.reply is not None:
                    left -= 1
                    self._note()
                    yield index, pending.reply.wait(0)
                await asyncio.sleep(0)  # a client that reads fast leaves the loop to others all the same
        finally:
            self.cancel()

    def _note(self) -> None:
        if not self._changed and not self._is_late:
            self._is_changed.clear()

    def _push_to(self, index: int) -> Callable[[Part], None]:
        def push(part: Part) -> None:
            pending = self._pending[index]
            if pending.first_token_at is None and part.token_ids:
                pending.first_token_at = time.monotonic()
            pending.add(part)
            self._change(index)

        def call(part: Part) -> None:
            self._loop.call_soon_threadsafe(push, part)

        return call

    def _end_to(self, index: int) -> Callable[[Reply], None]:
        def end(reply: Reply) -> None:
            pending = self._pending[index]
            pending.reply = reply
            self._left -= 1
            if not self._left:
                self.stop_clock()
            self._on_end(reply, pending.first_token_at)
            self._change(index)

        def call(reply: Reply) -> None:
            self._loop.call_soon_threadsafe(end, reply)

        return call

    def _change(self, index: int) -> None:
        self._changed.setdefault(index)
        self._is_changed.set()

    def _end_late(self) -> None:
        self._is_late = True
        self.cancel()
        self._is_changed.set()
