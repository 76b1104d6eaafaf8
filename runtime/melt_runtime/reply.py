"""An answer in the making, as whoever asked a service for it sees it."""

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from melt_runtime.arguments import function_or_none, instance, real_number
from melt_runtime.errors import CancelledError, QueueError, without_frames
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


@dataclass(frozen=True)
class Submission:
    """One of several requests that are submitted together.

    Attributes:
        request: checked prompt and settings, from ``Service.prepare``.
        on_part: called with what comes, pass by pass.
        on_end: called once, when ``result`` or ``error`` is there.
    """

    request: Request
    on_part: Callable[[Part], None] | None = None
    on_end: Callable[["Reply"], None] | None = None

    def __post_init__(self) -> None:
        """Checks them.

        Raises:
            ValueError: no request, or what cannot be called.
        """
        instance("request", self.request, Request, "a Request")
        function_or_none("on_part", self.on_part)
        function_or_none("on_end", self.on_end)


def require_process(process: int) -> None:
    """Refuses a forked child, in which the service's thread does not run and its locks may stay taken for ever.

    Raises:
        QueueError: this process is another than ``process``.
    """
    if os.getpid() != process:
        raise QueueError(
            "this process was forked from the one in which the service runs: load a model and make a service in it"
        )


def cancelled() -> CancelledError:
    """What ends a request that was cancelled."""
    return CancelledError("the request was cancelled before its end")


class Reply:
    """An answer in the making.

    ``on_part`` and ``on_end`` are called in the service's own thread and must be quick. Where the first fails, its
    error ends the request; one of the second is reported as that of any thread is.

    Attributes:
        result: the whole answer; None before its end, and where it has none.
        partial: what came of it until it was cancelled; None where it was not.
        error: why it has no result.
        queued_at: ``time.monotonic()`` when it was asked for.
        started_at: the same when a slot was free; None before.
    """

    def __init__(self, submission: Submission, group: object, wake: Callable[[], None]):
        self.result: GenerationResult | None = None
        self.partial: GenerationResult | None = None
        self.error: Exception | None = None
        self.queued_at = time.monotonic()
        self.started_at: float | None = None
        self._request = submission.request
        self._group = group  # what was asked for together
        self._process = os.getpid()
        self._on_part, self._on_end, self._wake = submission.on_part, submission.on_end, wake
        self._told = 0
        self._is_cancelled = False
        self._ended = threading.Event()

    def cancel(self) -> None:
        """Ends it before the next pass, with ``CancelledError``, from any thread; not where it has ended.

        In a forked child of the service's process it does nothing.
        """
        if os.getpid() == self._process:
            self._is_cancelled = True
            self._wake()

    def wait(self, seconds: float | None = None) -> GenerationResult:
        """The whole answer, once it is there.

        Args:
            seconds: time limit, at least 0; None: no limit.

        Raises:
            TimeoutError: not within ``seconds``; it goes on.
            ValueError: ``seconds`` outside its rule.
            QueueError: this process was forked from the service's before the answer was there.
            Exception: what ended it before its end, ``CancelledError`` where that was ``cancel``.
        """
        if seconds is not None:
            seconds = real_number("seconds", seconds, "at least 0", lambda value: value >= 0)
            seconds = min(seconds, threading.TIMEOUT_MAX)
        if not self._ended.is_set():
            require_process(self._process)
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

    def _leave(self, result: Callable[[], GenerationResult]) -> Exception:
        """Keeps what came of it until it was cancelled; the error to end it with."""
        try:
            self._request.cancel()
            self._tell()  # the text that was held back
            self.partial = result()
        except Exception as error:  # its caller's own, or a tokenizer's
            return error
        return cancelled()

    def _end(self, result: GenerationResult | None, error: Exception | None) -> None:
        self.result, self.error = result, None if error is None else without_frames(error)
        self._ended.set()
        if self._on_end is not None:
            try:
                self._on_end(self)
            except Exception as failed:  # the thread is everybody's, and goes on
                thread = threading.current_thread()
                threading.excepthook(threading.ExceptHookArgs((type(failed), failed, failed.__traceback__, thread)))
