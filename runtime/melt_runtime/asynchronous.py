"""``AsyncMeltModel``: a model for applications with an event loop; many requests at a time over its slots."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from types import TracebackType
from typing import Self, TypeVar, Unpack

from melt_runtime.errors import StreamError
from melt_runtime.model import MeltModel
from melt_runtime.reply import Part, Reply
from melt_runtime.request.generation_config import GenerationChanges, GenerationConfig
from melt_runtime.request.prompts import Prompt, say
from melt_runtime.request.result import GenerationResult
from melt_runtime.service import QUEUE

T = TypeVar("T")


async def submitted(submit: Callable[[], T], take_back: Callable[[T], None]) -> T:
    """What ``submit`` gives, called in a thread, since a chat template may take its time.

    A task that is cancelled meanwhile takes back what it asked for, once that is there.
    """
    asked = asyncio.ensure_future(asyncio.to_thread(submit))

    def forget(done: asyncio.Future[T]) -> None:
        if done.exception() is None:
            take_back(done.result())

    try:
        return await asyncio.shield(asked)
    except asyncio.CancelledError:
        asked.add_done_callback(forget)
        raise


class _Outcome:
    """What is known of a stream outside of its own coroutine, which refers to nothing above it."""

    def __init__(self) -> None:
        self.reply: Reply | None = None
        self.result: GenerationResult | None = None
        self.is_cancelled = False

    def of(self, reply: Reply) -> GenerationResult:
        """The answer, or what came of it where this stream was cancelled."""
        return reply.partial if self.is_cancelled and reply.partial is not None else reply.wait()


class AsyncGenerationStream(AsyncIterator[Part]):
    """Parts of an answer as they come; ``result`` after the last one.

    Left early (``aclose()``, the end of an ``async with`` block, a task that is cancelled, or since nobody holds it)
    it frees its slot.
    """

    def __init__(self, parts: AsyncGenerator[Part, None], outcome: _Outcome):
        self._parts, self._outcome = parts, outcome

    async def __anext__(self) -> Part:
        """The next part.

        Raises:
            QueueError: as many requests wait as may, or the model is closing.
            TokenError, CapacityError, ValueError: as for ``MeltModel.generate``.
        """
        return await anext(self._parts)

    def cancel(self) -> None:
        """Ends the answer before the next pass, from any thread; nothing happens where it has ended.

        The stream then gives what it has and ends, without an error; ``result`` has what came until then, with the
        finish reason ``cancelled``.
        """
        self._outcome.is_cancelled = True
        if self._outcome.reply is not None:
            self._outcome.reply.cancel()

    @property
    def result(self) -> GenerationResult:
        """The whole answer, or what came of it until it was cancelled.

        Raises:
            StreamError: the stream has not ended yet, or was left before its end.
        """
        if self._outcome.result is None:
            raise StreamError("the stream has not ended: iterate it to the end before asking for its result")
        return self._outcome.result

    async def aclose(self) -> None:
        """Ends it where it stands; nothing happens where it has ended."""
        await self._parts.aclose()

    async def __aenter__(self) -> Self:
        """The stream itself."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes it."""
        await self.aclose()


class AsyncMeltModel:
    """Answers requests side by side, up to the model's ``slots`` at once; the others wait in their order.

    Example::

        async with AsyncMeltModel(MeltModel.load("build/melt-tiny", slots=8)) as model:
            results = await asyncio.gather(*(model.generate(prompt) for prompt in prompts))

    Attributes:
        model: whose slots it uses; its own session is at work until ``close``.
        service: that answers its requests; ``service.load`` says how busy it is.
    """

    def __init__(self, model: MeltModel, queue: int = QUEUE):
        """Begins at once; ``queue`` requests may wait for a slot.

        Raises:
            BusyError: the model's own session is at work.
            ValueError: ``queue`` outside its rule.
        """
        self.model = model
        self.service = model.new_service(queue)

    async def generate(
        self,
        prompt: Prompt,
        config: GenerationConfig | None = None,
        raw: bool = False,
        **changes: Unpack[GenerationChanges],
    ) -> GenerationResult:
        """The whole answer; arguments as for ``MeltModel.generate``. A task that is cancelled frees its slot.

        Raises:
            QueueError: as many requests wait as may, or the model is closing.
            TokenError, CapacityError, ValueError: as for ``MeltModel.generate``.
        """
        loop, ended = asyncio.get_running_loop(), asyncio.Event()
        said = say(config, changes)

        def end(_: Reply) -> None:
            loop.call_soon_threadsafe(ended.set)

        reply = await self._submit(prompt, said, raw, None, end)
        try:
            await ended.wait()
        finally:
            reply.cancel()
        return reply.wait()

    def stream(
        self,
        prompt: Prompt,
        config: GenerationConfig | None = None,
        raw: bool = False,
        **changes: Unpack[GenerationChanges],
    ) -> "AsyncGenerationStream":
        """As ``generate``, part by part; the request is made with the first one.

        Raises:
            ValueError: unknown generation options. All else is raised with the first part, as for ``generate``.
        """
        outcome = _Outcome()
        return AsyncGenerationStream(self._parts(prompt, say(config, changes), raw, outcome), outcome)

    async def _parts(
        self, prompt: Prompt, said: GenerationConfig, raw: bool, outcome: _Outcome
    ) -> AsyncGenerator[Part, None]:
        if outcome.is_cancelled:  # before it was asked for
            request = await asyncio.to_thread(lambda: self.service.prepare(self.service.encode(prompt, raw), said))
            request.cancel()
            outcome.result = request.result(0, 0, self.model.state_bytes, passes=0)
            return
        loop = asyncio.get_running_loop()
        parts: asyncio.Queue[Part | None] = asyncio.Queue()

        def push(part: Part) -> None:
            loop.call_soon_threadsafe(parts.put_nowait, part)

        def end(_: Reply) -> None:
            loop.call_soon_threadsafe(parts.put_nowait, None)

        reply = outcome.reply = await self._submit(prompt, said, raw, push, end)
        if outcome.is_cancelled:
            reply.cancel()
        try:
            while (part := await parts.get()) is not None:
                yield part
            outcome.result = outcome.of(reply)
        except GeneratorExit:
            if outcome.is_cancelled:
                while await parts.get() is not None:
                    pass
                outcome.result = outcome.of(reply)
            raise
        finally:
            reply.cancel()

    async def _submit(
        self,
        prompt: Prompt,
        said: GenerationConfig,
        raw: bool,
        on_part: Callable[[Part], None] | None,
        on_end: Callable[[Reply], None],
    ) -> Reply:
        return await submitted(lambda: self.service.submit(prompt, said, raw, on_part, on_end), Reply.cancel)

    async def close(self, seconds: float = 0.0) -> None:
        """Takes no more requests, gives those that it has ``seconds`` to end, cancels what is left, and ends."""
        await asyncio.to_thread(self.service.close, seconds)

    async def __aenter__(self) -> Self:
        """The model itself."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes it."""
        await self.close()
