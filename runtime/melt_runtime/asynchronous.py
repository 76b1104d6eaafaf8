"""``AsyncMeltModel``: a model for applications with an event loop; many requests at a time over its slots."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from types import TracebackType
from typing import Self, TypeVar, Unpack

from melt_runtime.model import MeltModel
from melt_runtime.reply import Part, Reply
from melt_runtime.request.generation_config import GenerationChanges, GenerationConfig
from melt_runtime.request.prompts import Prompt, say
from melt_runtime.request.result import GenerationResult
from melt_runtime.service import QUEUE, Load

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


class AsyncMeltModel:
    """Answers requests side by side, up to the model's ``slots`` at once; the others wait in their order.

    Example::

        async with AsyncMeltModel(MeltModel.load("build/melt-tiny", slots=8)) as model:
            results = await asyncio.gather(*(model.generate(prompt) for prompt in prompts))

    Attributes:
        model: whose slots it uses; its own session is at work until ``close``.
    """

    def __init__(self, model: MeltModel, queue: int = QUEUE):
        """Begins at once; ``queue`` requests may wait for a slot.

        Raises:
            BusyError: the model's own session is at work.
            ValueError: ``queue`` outside its rule.
        """
        self.model = model
        self._service = model.new_service(queue)

    @property
    def load(self) -> Load:
        """How busy it is now."""
        return self._service.load

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

    async def stream(
        self,
        prompt: Prompt,
        config: GenerationConfig | None = None,
        raw: bool = False,
        **changes: Unpack[GenerationChanges],
    ) -> AsyncGenerator[Part | GenerationResult, None]:
        """As ``generate``, part by part, and the whole answer at the end. Left early (``aclose``, a task that is
        cancelled) it frees its slot.
        """
        loop = asyncio.get_running_loop()
        parts: asyncio.Queue[Part | None] = asyncio.Queue()
        said = say(config, changes)

        def push(part: Part) -> None:
            loop.call_soon_threadsafe(parts.put_nowait, part)

        def end(_: Reply) -> None:
            loop.call_soon_threadsafe(parts.put_nowait, None)

        reply = await self._submit(prompt, said, raw, push, end)
        try:
            while (part := await parts.get()) is not None:
                yield part
            yield reply.wait()
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
        return await submitted(lambda: self._service.submit(prompt, said, raw, on_part, on_end), Reply.cancel)

    async def close(self, seconds: float = 0.0) -> None:
        """Takes no more requests, gives those that it has ``seconds`` to end, cancels what is left, and ends."""
        await asyncio.to_thread(self._service.close, seconds)

    async def __aenter__(self) -> Self:
        """The model itself."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes it."""
        await self.close()
