"""An answer in the making, as whoever asked a service for it sees it."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from melt_runtime.errors import without_frames
from melt_runtime.request.logprobs import TokenLogprob
from melt_runtime.request.request import Request
from melt_runtime.request.result import GenerationResult


@dataclass(frozen=True)
class Part:
    """What came of an answer with one pass.

    Attributes:
        text: that is safe to show; sometimes none.
        token_ids: the new tokens, sometimes none: held back text may come at the end by itself.
        loops: after how many each of them was chosen.
        logprobs: of each, where they were asked for.
    """

    text: str
    token_ids: tuple[int, ...]
    loops: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]


class Reply:
    """An answer in the making.

    ``on_part`` and ``on_end`` are called in the service's own thread and must be quick. Where the first fails, its
    error ends the request; one of the second is reported as that of any thread is.

    Attributes:
        result: the whole answer; None before its end, and where it has none.
        error: why it has none.
        queued_at: ``time.monotonic()`` when it was asked for.
        started_at: the same when a slot was free; None before.
    """

    def __init__(
        self,
        request: Request,
        on_part: Callable[[Part], None] | None,
        on_end: Callable[["Reply"], None] | None,
        wake: Callable[[], None],
    ):
        self.result: GenerationResult | None = None
        self.error: Exception | None = None
        self.queued_at = time.monotonic()
        self.started_at: float | None = None
        self._request = request
        self._on_part, self._on_end, self._wake = on_part, on_end, wake
        self._told = 0
        self._is_cancelled = False
        self._ended = threading.Event()

    def cancel(self) -> None:
        """Ends it before the next pass, with ``CancelledError``, from any thread; not where it has ended."""
        self._is_cancelled = True
        self._wake()

    def wait(self, seconds: float | None = None) -> GenerationResult:
        """The whole answer, once it is there.

        Raises:
            TimeoutError: not within ``seconds``; it goes on.
            Exception: what ended it before its end, ``CancelledError`` where that was ``cancel``.
        """
        if not self._ended.wait(seconds):
            raise TimeoutError(f"the answer is not there after {seconds} s")
        if self.error is not None:
            raise self.error
        assert self.result is not None
        return self.result

    def _tell(self) -> None:
        """Hands out what came since this was last called."""
        request, first = self._request, self._told
        text, self._told = request.take_piece(), len(request.new_ids)
        if self._on_part is not None and (text or self._told > first):
            new_ids, loops, logprobs = request.new_ids[first:], request.loops[first:], request.logprobs[first:]
            self._on_part(Part(text, tuple(new_ids), tuple(loops), tuple(logprobs)))

    def _end(self, result: GenerationResult | None, error: Exception | None) -> None:
        self.result, self.error = result, None if error is None else without_frames(error)
        self._ended.set()
        if self._on_end is not None:
            try:
                self._on_end(self)
            except Exception as failed:  # the thread is everybody's, and goes on
                thread = threading.current_thread()
                threading.excepthook(threading.ExceptHookArgs((type(failed), failed, failed.__traceback__, thread)))
