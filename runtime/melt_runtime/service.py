"""Requests from any thread over the slots of one state: a thread of its own steps the batch, pass by pass.

Requests enter as slots become free, at any pass, in the order in which they came. Of requests that were submitted
together, one enters at a time while others wait, and one slot is left for others; a cancelled request leaves its slot
before the next pass. Prompts go in chunks between the passes of those that decode.
"""

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import NoneType, TracebackType
from typing import Self

from melt_runtime.arguments import instance, output_file, path_of, real_number, whole_number
from melt_runtime.conversations import Conversations
from melt_runtime.engine import Engine, Job
from melt_runtime.errors import BusyError, QueueError, RunError
from melt_runtime.reply import Part, Reply, Submission, cancelled, require_process
from melt_runtime.request.generation_config import GenerationConfig
from melt_runtime.request.prompts import Desk, EncodedPrompt, Prompt, as_chat
from melt_runtime.request.request import Request
from melt_runtime.request.result import GenerationResult
from melt_runtime.waiting import Waiting

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
        queue: maximum number of waiting requests; those submitted together count as one.
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
        self._waiting = Waiting()
        self._work: deque[tuple[Callable[[], int], Future[int]]] = deque()
        self._running: dict[Job, Reply] = {}
        self._changed = threading.Condition()
        self._is_closing = False
        self._deadline = 0.0
        self._passes_before = engine.passes
        self._process = os.getpid()
        self._conversations = Conversations(engine, desk.identity)
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
    def load(self) -> Load:
        """How busy it is now; in a forked child of the service's process a ``QueueError``."""
        require_process(self._process)
        with self._changed:
            passes = self._engine.passes - self._passes_before
            return Load(len(self._slots), len(self._running), len(self._waiting), self._queue, passes)

    def submit(
        self,
        prompt: Prompt,
        config: GenerationConfig,
        raw: bool = False,
        on_part: Callable[[Part], None] | None = None,
        on_end: Callable[[Reply], None] | None = None,
    ) -> Reply:
        """Submits a request; from any thread.

        Args:
            prompt: as for ``MeltModel.generate``.
            config: generation options; unset fields take the bundle's defaults.
            raw: give a string to the model as it is.
            on_part: called with what comes, pass by pass.
            on_end: called once, when ``result`` or ``error`` is there.

        Raises:
            QueueError: the queue is full, the service is closing, or this process was forked from the service's.
            TokenError, CapacityError, ValueError: as for ``MeltModel.generate``.
        """
        with self._open(queues=True):
            pass  # before the work on its prompt
        request = self.prepare(self.encode(prompt, raw), config)
        return self.submit_all([Submission(request, on_part, on_end)])[0]

    def encode(self, prompt: Prompt, raw: bool = False) -> EncodedPrompt:
        """A prompt's token ids, as ``submit`` takes it.

        Raises:
            TokenError, CapacityError, ValueError: as for ``MeltModel.generate``.
        """
        instance("raw", raw, bool, "True or False")
        return self.desk.read(prompt, raw)

    def prepare(
        self, prompt: EncodedPrompt, config: GenerationConfig, defaults: GenerationConfig | None = None
    ) -> Request:
        """A checked request, to be submitted with others.

        Args:
            prompt: from ``encode``; several requests may share it.
            config: generation options.
            defaults: for fields that ``config`` does not have; the bundle has the others.

        Raises:
            CapacityError, ValueError: as for ``submit``.
        """
        instance("prompt", prompt, EncodedPrompt, "an EncodedPrompt")
        instance("config", config, GenerationConfig, "a GenerationConfig")
        instance("defaults", defaults, (GenerationConfig, NoneType), "a GenerationConfig or None")
        return Request(prompt, self.desk.settle(config, len(prompt.ids), defaults), self.desk.codec)

    def submit_all(self, submissions: Sequence[Submission]) -> list[Reply]:
        """Submits requests together, all or none; from any thread. They count as one in the queue, and share the slots.

        Raises:
            QueueError: the queue is full, the service is closing, or this process was forked from the service's.
            ValueError: ``submissions`` is no list of ``Submission``.
        """
        for one in instance("submissions", submissions, (list, tuple), "a list of Submission"):
            instance("submissions", one, Submission, "a list of Submission")
        group = object()
        replies = [Reply(one, group, self._notify) for one in submissions]
        with self._open(queues=True):
            self._waiting.add(replies)
            self._changed.notify()
        return replies

    def save(self, prompt: Prompt, path: Path, raw: bool = False) -> int:
        """Writes what a free slot holds of a conversation to a file, in one step; from any thread, between two passes.

        An answer's text may become other tokens than those that were drawn: what the slot holds is saved up to there,
        which is what a request that goes on with the conversation can use.

        Args:
            prompt: the conversation so far, as for ``submit``, with or without its last answer.
            path: the file; one that exists is replaced.
            raw: as for ``submit``.

        Returns:
            Cached tokens that were written.

        Raises:
            SavedError: no slot holds it, or only ones that are at work.
            OSError: the file cannot be written.
            QueueError: the service is closing, or this process was forked from the service's.
            BusyError: called from a callback of the service.
            TokenError, CapacityError, ValueError: as for ``submit``; or ``path`` is none that may be written.
        """
        file = output_file("path", path)
        conversations = [self.encode(prompt, raw).ids]
        chat = as_chat(prompt, raw)
        if chat is not None and len(chat) > 1 and chat[-1].get("role") == "assistant":
            # What was answered last. Some templates show an answer otherwise than they ask for it.
            conversations.append(self.encode(chat[:-1]).ids)
        return self._between_passes(lambda: self._conversations.save(conversations, file))

    def restore(self, path: Path) -> int:
        """Reads such a file into a free slot, whose next requests then need not compute it; from any thread.

        Returns:
            Cached tokens that were read.

        Raises:
            SavedError: no such file, one of another model or KV cache, or a damaged one.
            CapacityError: more tokens than a slot has room for.
            QueueError: every slot is at work, the service is closing, or this process was forked from the service's.
            BusyError: called from a callback of the service.
            ValueError: ``path`` is no path.
        """
        file = path_of("path", path, "a file")
        return self._between_passes(lambda: self._conversations.restore(file))

    def _between_passes(self, work: Callable[[], int]) -> int:
        """What ``work`` gives, run by the service's own thread, which alone may touch the state."""
        if threading.current_thread() is self._thread:
            raise BusyError("a callback of the service cannot wait for the service: call it from another thread")
        done: Future[int] = Future()
        with self._open(queues=False):
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
            except BaseException as error:  # whoever waits for it must be told, of a panic of a library too
                done.set_exception(_as_exception(error))

    def close(self, seconds: float = 0.0) -> None:
        """Takes no more requests, gives those that it has ``seconds`` to end, cancels what is left, and ends.

        In a forked child of the service's process it does nothing.

        Raises:
            ValueError: ``seconds`` is no number of at least 0.
        """
        seconds = real_number("seconds", seconds, "at least 0", lambda value: value >= 0)
        if os.getpid() != self._process:
            return
        with self._changed:
            if not self._is_closing:
                self._is_closing = True
                self._deadline = time.monotonic() + min(seconds, threading.TIMEOUT_MAX)
            self._changed.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    @contextmanager
    def _open(self, queues: bool) -> Iterator[None]:
        """Holds the lock of a service that accepts work; ``queues``: a request, for which the queue must have room.

        Raises:
            QueueError: it does not, or there is none.
        """
        require_process(self._process)
        with self._changed:
            if self._is_closing:
                raise QueueError("the service is closing: it accepts no new requests")
            if queues and self._waiting.submissions >= self._queue + len(self._slots) - len(self._running):
                raise QueueError(f"queue full ({self._queue} requests waiting); retry later")
            yield

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
                self._end_all(cancelled())
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
        """Gives free slots to requests that wait."""
        while self._slots.free:
            with self._changed:
                reply = self._waiting.take(self._running.values(), len(self._slots))
            if reply is None:
                return
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
            gone = self._waiting.take_cancelled()
            jobs = [(job, reply) for job, reply in self._running.items() if reply._is_cancelled]
        state_bytes = self._engine.state_bytes
        for reply in gone:
            reply._end(None, reply._leave(partial(reply._request.result, 0, 0, state_bytes, passes=0)))
        for job, reply in jobs:
            self._leave(job, None, reply._leave(partial(job.result, state_bytes)))

    def _end_all(self, error: Exception) -> None:
        """Takes no more requests, and ends those that it has."""
        with self._changed:
            self._is_closing = True
            gone, work = self._waiting.take_all(), [*self._work]
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
        self._conversations.note(job)
        with self._changed:
            reply = self._running.pop(job)
        reply._end(result, error)


def _as_exception(error: BaseException) -> Exception:
    """What a request is told of an error that is not one of Python's ordinary ones."""
    return error if isinstance(error, Exception) else RunError(f"{type(error).__name__}: {error}")
