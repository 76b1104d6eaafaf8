"""Requests from any thread over the slots of one state: a thread of its own steps the batch, pass by pass.

Requests wait in the order in which they came and enter as slots become free, at any pass; one that is cancelled leaves
its slot before the next pass. Their prompts go in chunks between the passes of those that decode.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from melt_runtime.arguments import real_number, whole_number
from melt_runtime.engine import Engine, Job
from melt_runtime.errors import CancelledError, QueueError, RunError, SavedError
from melt_runtime.reply import Part, Reply
from melt_runtime.request.generation_config import GenerationConfig
from melt_runtime.request.prompts import Desk, EncodedPrompt, Prompt
from melt_runtime.request.request import Request
from melt_runtime.request.result import GenerationResult
from melt_runtime.schedule.depth import Depth

QUEUE = 128
"""Requests that may wait for a slot, where nobody says."""
_MOST_QUEUE = 1 << 20


@dataclass(frozen=True)
class Load:
    """How busy a service is.

    Attributes:
        slots: of the state.
        running: requests that have one.
        waiting: requests that wait for one.
        queue: most that may.
        passes: runs of the loop graph since the service began.
    """

    slots: int
    running: int
    waiting: int
    queue: int
    passes: int


class Service:
    """Answers requests until it is closed; meanwhile the model's own session is at work.

    A pass that ONNX Runtime could not run ends the requests that were in it; the service goes on.

    Attributes:
        desk: checks and encodes prompts, from any thread.
    """

    def __init__(
        self,
        engine: Engine,
        desk: Desk,
        lent: Callable[[object], AbstractContextManager[None]],
        queue: int = QUEUE,
    ):
        """Begins at once.

        Raises:
            BusyError: the model's own session is at work.
            ValueError: ``queue`` outside its rule.
        """
        self._queue = whole_number("queue", queue, 1, _MOST_QUEUE)
        self._engine, self.desk, self._slots = engine, desk, engine.executor.slots
        self._waiting: deque[Reply] = deque()
        self._work: deque[tuple[Callable[[], int], Future[int]]] = deque()
        self._running: dict[Job, Reply] = {}
        self._changed = threading.Condition()
        self._is_closing = False
        self._deadline = 0.0
        self._passes_before = engine.passes
        held = threading.Event()
        refused: list[Exception] = []

        def run() -> None:
            try:
                with lent(self):
                    held.set()
                    self._run()
            except BaseException as error:  # a panic of a library is not even an Exception, and ends the thread as well
                if held.is_set():
                    self._end_all(_as_exception(error))
                    raise
                refused.append(_as_exception(error))
                held.set()

        self._thread = threading.Thread(target=run, name="melt-service", daemon=True)
        self._thread.start()
        held.wait()
        if refused:
            raise refused[0]

    @property
    def is_open(self) -> bool:
        """Whether it takes requests."""
        return not self._is_closing and self._thread.is_alive()

    @property
    def most(self) -> int:
        """Requests that it can have at once, running and waiting."""
        return self._queue + len(self._slots)

    @property
    def load(self) -> Load:
        """How busy it is now."""
        with self._changed:
            return Load(
                len(self._slots),
                len(self._running),
                len(self._waiting),
                self._queue,
                self._engine.passes - self._passes_before,
            )

    def submit(
        self,
        prompt: Prompt | EncodedPrompt,
        config: GenerationConfig,
        raw: bool = False,
        on_part: Callable[[Part], None] | None = None,
        on_end: Callable[[Reply], None] | None = None,
        defaults: GenerationConfig | None = None,
    ) -> Reply:
        """Takes a request; from any thread.

        Args:
            prompt: as for ``MeltModel.generate``.
            config: what it does not say, the bundle says.
            raw: give a string to the model as it is.
            on_part: called with what comes, pass by pass.
            on_end: called once, when ``result`` or ``error`` is there.
            defaults: for fields that ``config`` does not have; the bundle has the others.

        Raises:
            QueueError: as many requests wait as may, or the service is closing.
            TokenError, CapacityError, ValueError: as for ``MeltModel.generate``.
        """
        with self._changed:
            self._require_room()
        encoded = self.desk.read(prompt, raw)
        request = Request(encoded, self.desk.settle(config, len(encoded.ids), defaults), self.desk.codec)
        reply = Reply(request, on_part, on_end, self._notify)
        with self._changed:
            self._require_room()
            self._waiting.append(reply)
            self._changed.notify()
        return reply

    def save(self, prompt: Prompt, path: Path, raw: bool = False) -> int:
        """Writes what a free slot holds of a conversation to a file, in one step; from any thread, between two passes.

        Args:
            prompt: the conversation so far, as for ``submit``; a slot counts that holds nothing else.
            path: the file; one that exists is replaced.
            raw: as for ``submit``.

        Returns:
            Cached tokens that were written.

        Raises:
            SavedError: no slot holds any of it, or only ones that are at work.
            OSError: the file cannot be written.
            QueueError: the service is closing.
        """
        ids = self.desk.read(prompt, raw).ids

        def run() -> int:
            held = [slot for slot in self._slots if self._slots.is_free(slot) and slot.length]
            held = [slot for slot in held if slot.ids[: slot.length] == ids[: slot.length]]
            if not held:
                raise SavedError("no slot that is free holds this conversation: let it be answered first")
            slot = max(held, key=lambda slot: slot.length)
            from melt_runtime.execute.saved import save_slot  # here: what reads it takes longer to import than all else

            save_slot(path, self._engine.executor.state, slot, self.desk.identity, {})
            return slot.length

        return self._between_passes(run)

    def restore(self, path: Path) -> int:
        """Reads such a file into a free slot, whose next requests then need not compute it; from any thread.

        Returns:
            Cached tokens that were read.

        Raises:
            SavedError: no such file, one of another model or KV cache, or a damaged one.
            CapacityError: more tokens than a slot has room for.
            QueueError: every slot is at work, or the service is closing.
        """

        def run() -> int:
            from melt_runtime.execute.saved import load_slot

            if not self._slots.free:
                raise QueueError("every slot is at work: ask again later")
            slot = self._slots.acquire_for((), Depth.fixed(1))
            try:
                load_slot(path, self._engine.executor.state, slot, self.desk.identity, dict[str, Any])
                return slot.length
            finally:
                self._slots.release(slot)

        return self._between_passes(run)

    def _between_passes(self, work: Callable[[], int]) -> int:
        """What ``work`` gives, run by the service's own thread, whose state is nobody else's to touch."""
        done: Future[int] = Future()
        with self._changed:
            if self._is_closing:
                raise QueueError("the service is closing: it takes no more requests")
            self._work.append((work, done))
            self._changed.notify()
        return done.result()

    def _do_work(self) -> None:
        """Runs what was asked for meanwhile."""
        while True:
            with self._changed:
                if not self._work:
                    return
                work, done = self._work.popleft()
            try:
                done.set_result(work())
            except Exception as error:
                done.set_exception(error)

    def close(self, seconds: float = 0.0) -> None:
        """Takes no more requests, gives those that it has ``seconds`` to end, cancels what is left, and ends.

        Raises:
            ValueError: ``seconds`` is no number of at least 0.
        """
        seconds = real_number("seconds", seconds, "at least 0", lambda value: value >= 0)
        with self._changed:
            if not self._is_closing:
                self._is_closing = True
                self._deadline = time.monotonic() + min(seconds, threading.TIMEOUT_MAX)
            self._changed.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _require_room(self) -> None:
        if self._is_closing:
            raise QueueError("the service is closing: it takes no more requests")
        if len(self._waiting) + len(self._running) >= self.most:
            raise QueueError(f"{self._queue} requests wait already, as many as may: ask again later")

    def __enter__(self) -> Self:
        """The service itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes it."""
        self.close()

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify()

    def _run(self) -> None:
        """The thread's work, until the service is closed and nothing is left."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._running or self._work or self._is_closing)
                if self._is_closing and not self._waiting and not self._running and not self._work:
                    return
            self._do_work()
            if self._is_closing and time.monotonic() >= self._deadline:
                self._end_all(_cancelled())
                continue
            self._drop_cancelled()
            self._admit()
            if self._running:
                self._run_pass()

    def _run_pass(self) -> None:
        try:
            self._engine.run_pass()
        except BaseException as error:  # of ONNX Runtime, or a panic of a library; what the buffers hold, nobody knows
            for job in [*self._running]:
                self._leave(job, None, _as_exception(error))
            return
        for job, reply in [*self._running.items()]:
            try:
                reply._tell()
            except Exception as error:  # its caller's own
                job.error = error
            if not job.is_done:
                continue
            result = None
            try:
                result = None if job.error else job.result(self._engine.state_bytes)
            except Exception as error:
                job.error = error
            self._leave(job, result, job.error)

    def _admit(self) -> None:
        """Gives free slots to those that wait, in their order."""
        while self._slots.free:
            with self._changed:
                if not self._waiting:
                    return
                reply = self._waiting.popleft()
            request = reply._request
            slot = self._slots.acquire_for(request.prompt, request.settings.depth)
            reply.started_at = time.monotonic()
            try:
                job = self._engine.admit(request, slot)
            except Exception as error:
                reply._end(None, error)
                continue
            with self._changed:
                self._running[job] = reply

    def _drop_cancelled(self) -> None:
        with self._changed:
            gone = [reply for reply in self._waiting if reply._is_cancelled]
            for reply in gone:
                self._waiting.remove(reply)
            jobs = [job for job, reply in self._running.items() if reply._is_cancelled]
        for reply in gone:
            reply._end(None, _cancelled())
        for job in jobs:
            self._leave(job, None, _cancelled())

    def _end_all(self, error: Exception) -> None:
        """Takes no more requests, and ends those that it has."""
        with self._changed:
            self._is_closing = True
            gone, work = [*self._waiting], [*self._work]
            self._waiting.clear()
            self._work.clear()
        for _, done in work:
            done.set_exception(error)
        for reply in gone:
            reply._end(None, error)
        for job in [*self._running]:
            self._leave(job, None, error)

    def _leave(self, job: Job, result: GenerationResult | None, error: Exception | None) -> None:
        """Ends a job's request; its slot is free, and what its cache holds may serve the next one."""
        self._engine.drop(job)
        self._slots.release(job.slot)
        with self._changed:
            reply = self._running.pop(job)
        reply._end(result, error)


def _as_exception(error: BaseException) -> Exception:
    """What a request is told of an error that is not one of Python's ordinary ones."""
    return error if isinstance(error, Exception) else RunError(f"{type(error).__name__}: {error}")


def _cancelled() -> CancelledError:
    return CancelledError("the request was cancelled before its end")
