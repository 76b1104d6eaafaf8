"""One answer of a conversation, piece by piece, over the engine; what stays of it when it is left early."""

import weakref
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypeVar

from melt_runtime.engine import Engine
from melt_runtime.errors import BusyError, StreamError
from melt_runtime.execute.slots import Slot
from melt_runtime.execute.snapshot import Snapshot
from melt_runtime.hold import Hold
from melt_runtime.progress import Progress
from melt_runtime.request.request import Request
from melt_runtime.request.result import GenerationResult

T = TypeVar("T", covariant=True)


class Ticket:
    """Holds a session for a stream, while somebody holds the stream.

    Attributes:
        begun: whether it has taken the session once.
    """

    def __init__(self, stream: "Held[Any]"):
        self.stream = weakref.ref(stream)
        self.begun = False


@dataclass(frozen=True)
class Ask:
    """A turn as it was asked for, checked.

    Attributes:
        request: makes a new request, since a stream that was refused may be asked again.
        turn: of the slot, where the prompt was made from the conversation at that turn; None where it stands alone.
        fresh: run it from an empty cache.
        on_end: called with the answer's text when the turn counts.
        progress: called while the prompt is run.
    """

    request: Callable[[], Request]
    turn: int | None
    fresh: bool
    on_end: Callable[[str], None]
    progress: Progress | None


class Turn:
    """Runs one ask over a session's slot."""

    def __init__(self, engine: Engine, slot: Slot, hold: Hold, ask: Ask):
        self._engine, self._slot, self._hold, self._ask = engine, slot, hold, ask
        self.result: GenerationResult | None = None
        self.loops = 0
        self.is_cancelled = False

    def run(self, owner: Ticket) -> Generator[str, None, None]:
        """Pieces of text, while ``owner`` holds the session.

        Left early, or cancelled, before the first token there is no turn and the conversation is what it was; after it
        the turn stays, with the text so far.

        Raises:
            BusyError: the session is at work.
            StreamError: the conversation is no longer the one that the prompt was made from.
        """
        slot, ask = self._slot, self._ask
        if self.is_cancelled:  # before it took anything
            request = ask.request()
            request.cancel()
            self.result = request.result(0, 0, self._engine.state_bytes, passes=0)
            return
        try:
            self._hold.take(owner)
            if ask.turn is not None and ask.turn != slot.turn:
                raise StreamError("another turn began, or a reset, since this stream was made: make it again")
            owner.begun = True
            request = ask.request()
            before, kept = slot.snapshot(), self._kept(request)
            try:
                slot.begin(request.prompt, kept, request.settings.loops)
                yield from self._answer(request)
            finally:
                if self.result is None or self.result.finish_reason == "cancelled":
                    self._leave(request, before, len(before.depths) if kept is None else kept)
        finally:
            self._hold.free(owner)

    def _kept(self, request: Request) -> int | None:
        """Cached tokens to keep; None where the prompt continues the conversation."""
        ask, slot = self._ask, self._slot
        if ask.fresh:
            return 0
        if ask.turn is not None and slot.continues(request.prompt):
            return None
        return slot.reusable(request.prompt, request.settings.depth)

    def _answer(self, request: Request) -> Iterator[str]:
        engine = self._engine
        job = engine.start(request, self._slot, self._ask.progress)
        try:
            while not job.is_done:
                if self.is_cancelled:
                    request.cancel()
                else:
                    engine.run_pass()
                if job.error is not None:
                    raise job.error
                if piece := request.take_piece():
                    self.loops = request.loops[-1]
                    yield piece
        except GeneratorExit:
            if self.is_cancelled:
                request.cancel()
                self.result = job.result(engine.state_bytes)
            raise
        finally:
            engine.drop(job)
        self.result = job.result(engine.state_bytes)
        if self.result.finish_reason != "cancelled":
            self._ask.on_end(request.text)

    def _leave(self, request: Request, before: Snapshot, kept: int) -> None:
        """Ends the turn where it stands."""
        if request.new_ids:
            self._slot.leave(len(request.prompt) + len(request.new_ids))
            self._ask.on_end(request.text_so_far())
        else:
            self._slot.undo(before, kept)


class Held(Iterator[T]):
    """What comes while a session is held: from the first element on, until the last, until it is closed, or nobody
    holds it any more. Meanwhile every other call on the session is refused with ``BusyError``.
    """

    def __init__(self, run: Callable[[Ticket], Generator[T, None, None]]):
        self._run = run
        self._stepping = Hold("this stream is at work in another thread already: read it from one")
        # The generator refers to nothing above it: a stream that nobody holds ends at once.
        self._ticket = Ticket(self)
        self._elements = run(self._ticket)

    def __next__(self) -> T:
        """The next element.

        Raises:
            BusyError: the session is at work; the stream may be asked again.
            StreamError: the conversation went on since the stream was made.
            NumericalError: the model computed NaN or infinity.
        """
        with self._stepping.taken():
            try:
                return next(self._elements)
            except (BusyError, StreamError):
                if not self._ticket.begun:  # else it is its reader's own: what began ends
                    self._elements = self._run(self._ticket)
                raise

    def close(self) -> None:
        """Ends it where it stands; nothing happens where it has ended.

        Raises:
            BusyError: another thread is at an element.
        """
        with self._stepping.taken():
            self._elements.close()

    def __enter__(self) -> Self:
        """The stream itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes it."""
        self.close()


class GenerationStream(Held[str]):
    """Pieces of an answer as they come, never empty; ``result`` after the last one.

    Making a stream checks everything and moves nothing. With its first piece it takes the session, until it ends, is
    closed or nobody holds it any more; meanwhile every other call on the session is refused with ``BusyError``.

    Left before its end (``close()``, the end of a ``with`` block, an error, Ctrl-C, or since nobody holds it) it leaves
    a usable conversation: before the first new token the one that was before the turn; after it the turn stays, with
    the text so far as the assistant's message, and the next turn goes on from there.
    """

    def __init__(self, turn: Turn):
        super().__init__(turn.run)
        self._turn = turn

    @property
    def loops(self) -> int:
        """After how many loops the token was chosen that completed the last piece; 0 before the first."""
        return self._turn.loops

    def cancel(self) -> None:
        """Ends the answer before the next pass, from any thread; nothing happens where it has ended.

        The stream then gives what text it held back and ends, without an error; ``result`` has what came until then,
        with the finish reason ``cancelled``.
        """
        self._turn.is_cancelled = True

    @property
    def result(self) -> GenerationResult:
        """The whole answer, or what came of it until it was cancelled.

        Raises:
            StreamError: the stream has not ended yet, or was left before its end.
            BusyError: it was cancelled, and another thread is at its last piece.
        """
        if self._turn.result is None and self._turn.is_cancelled:
            for _ in self:  # runs no pass
                pass
        if self._turn.result is None:
            raise StreamError("the stream has not ended: iterate it to the end before asking for its result")
        return self._turn.result

    def run_to_end(self) -> GenerationResult:
        """The whole answer, without its pieces."""
        with self:
            for _ in self:
                pass
        return self.result
