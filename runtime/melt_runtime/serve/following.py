"""The choices of one request, as they come from the service's thread to a handler of the event loop."""

import asyncio
from collections.abc import AsyncGenerator, Sequence

from melt_runtime.asynchronous import submitted
from melt_runtime.reply import Part, Reply
from melt_runtime.request.result import GenerationResult
from melt_runtime.serve.asks import Ask
from melt_runtime.serve.errors import Fault, FaultError, FieldError
from melt_runtime.service import Service


async def submit(service: Service, asks: Sequence[Ask]) -> "Choices":
    """Takes all answers of a request, or none.

    Raises:
        QueueError, TokenError, CapacityError, ValueError: of any of them; the others are cancelled.
    """
    choices = Choices(len(asks))
    await submitted(lambda: choices.submit(service, asks), lambda _: choices.cancel())
    return choices


class Choices:
    """Answers under way.

    Attributes:
        replies: of each choice.
    """

    def __init__(self, count: int):
        self.replies: list[Reply] = []
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Part | None]] = asyncio.Queue()
        self._left = count

    def submit(self, service: Service, asks: Sequence[Ask]) -> None:
        """Asks for every answer.

        Raises:
            FieldError: more of them than the service can ever have.
        """
        if len(asks) > service.most:
            message = f"this server takes {service.most} answers at once, prompts times n: got {len(asks)}"
            raise FieldError("n", message)
        try:
            for index, ask in enumerate(asks):
                self.replies.append(self._submit(service, index, ask))
        except BaseException:
            self.cancel()
            raise

    def _submit(self, service: Service, index: int, ask: Ask) -> Reply:
        def push(part: Part) -> None:
            self._loop.call_soon_threadsafe(self._events.put_nowait, (index, part))

        def end(_: Reply) -> None:
            self._loop.call_soon_threadsafe(self._events.put_nowait, (index, None))

        return service.submit(ask.prompt, ask.config, False, push, end, ask.defaults)

    def cancel(self) -> None:
        """Ends all that are under way."""
        for reply in self.replies:
            reply.cancel()

    async def follow(self, seconds: float) -> AsyncGenerator[tuple[int, Part | GenerationResult], None]:
        """(choice, what came of it) until all have ended; left early, they are cancelled.

        Raises:
            FaultError: they took more than ``seconds``.
            Exception: what ended one of them before its end.
        """
        loop = asyncio.get_running_loop()
        ends = loop.time() + seconds
        try:
            while self._left:
                index, part = await asyncio.wait_for(self._events.get(), max(0.0, ends - loop.time()))
                if part is not None:
                    yield index, part
                    continue
                self._left -= 1
                yield index, self.replies[index].wait(0)
        except TimeoutError as error:
            fault = Fault(504, f"the answer took more than {seconds:g} s", "server_error", code="timeout")
            raise FaultError(fault) from error
        finally:
            self.cancel()
