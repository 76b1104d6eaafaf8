"""One answer: prefill, then decode token by token, to streamed text and a result with its costs."""

import time
import weakref
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Self

from melt_runtime.errors import BusyError, StreamError
from melt_runtime.history import Snapshot, TokenHistory
from melt_runtime.hold import Hold
from melt_runtime.loop import LoopRunner, Progress
from melt_runtime.request.generation_config import GenerationSettings
from melt_runtime.request.sampler import Sampler
from melt_runtime.text.codec import StopMatcher, TextCodec

FinishReason = Literal["stop", "length"]
"""``stop``: a stop token or stop string; ``length``: ``max_new_tokens`` were generated, or the state is full."""


@dataclass(frozen=True)
class Timings:
    """Seconds of computation and tokens of the two phases; the first new token comes out of prefill."""

    prefill_seconds: float
    prefill_tokens: int
    decode_seconds: float
    decode_tokens: int

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens per second."""
        return self.prefill_tokens / self.prefill_seconds

    @property
    def decode_rate(self) -> float:
        """Tokens per second in decode; 0 where the answer was a single token."""
        return self.decode_tokens / self.decode_seconds if self.decode_tokens else 0.0


@dataclass(frozen=True)
class GenerationResult:
    """An answer.

    Attributes:
        text: without stop string and special tokens.
        token_ids: every token generated, the stop token included.
        finish_reason: ``stop`` or ``length``.
        loops: depth T it was made with.
        prompt_tokens: tokens of the prompt, of which ``cached_tokens`` were in the session's cache already.
        timings: seconds and tokens of prefill and decode.
        state_bytes: bytes of the whole state, cache included.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    loops: int
    prompt_tokens: int
    cached_tokens: int
    timings: Timings
    state_bytes: int


@dataclass(frozen=True)
class Request:
    """A turn as it was asked for, checked.

    Attributes:
        prompt: token ids of all that the model is to see, at least one.
        settings: how to continue it.
        turn: of the history, where the prompt was made from the conversation at that turn; None where it stands alone.
        fresh: run it from an empty cache.
        on_end: called with the answer's text when the turn counts.
        progress: called while the prompt is run.
    """

    prompt: list[int]
    settings: GenerationSettings
    turn: int | None
    fresh: bool
    on_end: Callable[[str], None]
    progress: Progress | None


class AnswerText:
    """An answer's tokens to its text, without stop tokens and from a stop string on."""

    def __init__(self, codec: TextCodec, settings: GenerationSettings):
        self._decoder, self._stops = codec.stream(), StopMatcher(settings.stop)
        self._stop_ids = settings.stop_ids
        self.stopped = False

    def push(self, token: int) -> str:
        """Text that is safe to show with this token, sometimes none; sets ``stopped`` where the answer ends."""
        if token in self._stop_ids:
            self.stopped = True
            return ""
        piece = self._stops.push(self._decoder.push(token))
        self.stopped = self._stops.found is not None
        return piece

    def finish(self) -> str:
        """What was held back, when no more tokens come."""
        if self._stops.found is not None:
            return ""
        piece = self._stops.push(self._decoder.flush())
        self.stopped = self.stopped or self._stops.found is not None
        return piece + self._stops.flush()


class Turn:
    """Runs one request over a session's history."""

    def __init__(self, runner: LoopRunner, codec: TextCodec, history: TokenHistory, hold: Hold, request: Request):
        self._runner, self._codec, self._history, self._hold = runner, codec, history, hold
        self._request = request
        self.result: GenerationResult | None = None

    def run(self, owner: object) -> Generator[str, None, None]:
        """Pieces of text, while ``owner`` holds the session.

        Left early, before the first token there is no turn and the conversation is what it was; after it the turn
        stays, with the text so far.

        Raises:
            BusyError: the session is at work.
            StreamError: the conversation is no longer the one that the prompt was made from.
        """
        history, request = self._history, self._request
        try:
            self._hold.take(owner)
            if request.turn is not None and request.turn != history.turn:
                raise StreamError("another turn began, or a reset, since this stream was made: make it again")
            before = history.snapshot()
            kept = self._kept()
            try:
                history.begin(request.prompt, kept)
                yield from self._answer()
            except BaseException:
                self._leave(before, len(before.depths) if kept is None else kept)
                raise
        finally:
            self._hold.free(owner)

    def _kept(self) -> int | None:
        """Cached tokens to keep; None where the prompt continues the conversation."""
        request, history = self._request, self._history
        if request.fresh:
            return 0
        if request.turn is not None and history.continues(request.prompt):
            return None
        return history.reusable(request.prompt, request.settings.loops)

    def _answer(self) -> Iterator[str]:
        request, history = self._request, self._history
        cached, prompt_tokens = history.cached, len(request.prompt)
        prefill, decode = self._choosers()
        text, shown = AnswerText(self._codec, request.settings), ""
        started = time.perf_counter()
        token = prefill()
        prefill_seconds, decode_seconds = time.perf_counter() - started, 0.0
        while True:
            history.ids.append(token)
            if piece := text.push(token):
                shown += piece
                yield piece
            if text.stopped or len(history.ids) - prompt_tokens == request.settings.max_new_tokens:
                break
            started = time.perf_counter()
            token = decode(token)
            decode_seconds += time.perf_counter() - started
        if piece := text.finish():
            shown += piece
            yield piece
        new_ids = tuple(history.ids[prompt_tokens:])
        self.result = GenerationResult(
            text=shown,
            token_ids=new_ids,
            finish_reason="stop" if text.stopped else "length",
            loops=request.settings.loops,
            prompt_tokens=prompt_tokens,
            cached_tokens=cached,
            timings=Timings(
                prefill_seconds=prefill_seconds,
                prefill_tokens=prompt_tokens - cached,
                decode_seconds=decode_seconds,
                decode_tokens=len(new_ids) - 1,
            ),
            state_bytes=self._runner.state.nbytes,
        )
        request.on_end(shown)

    def _leave(self, before: Snapshot, kept: int) -> None:
        """Ends the turn where it stands."""
        history = self._history
        new_ids = [] if history.ids is before.ids else history.ids[len(self._request.prompt) :]
        if not new_ids:
            history.undo(before, kept)
            return
        history.leave()
        text = AnswerText(self._codec, self._request.settings)
        self._request.on_end("".join([*map(text.push, new_ids), text.finish()]))

    def _choosers(self) -> tuple[Callable[[], int], Callable[[int], int]]:
        """What runs the prompt, and what runs a token, each up to the next token: drawn on the device where its sampler
        does what the settings ask for, else on the host."""
        runner, history, settings = self._runner, self._history, self._request.settings
        loops = settings.loops
        if runner.sampler is not None and runner.sampler.can_draw(settings):
            runner.sampler.start(settings)
            return (
                lambda: runner.prefill_and_draw(*self._rest_of_prompt()),
                lambda token: runner.decode_and_draw(token, loops),
            )
        sampler = Sampler(settings)

        def first() -> int:
            ids, _, progress = self._rest_of_prompt()
            return sampler.choose(runner.prefill(ids, loops, progress=progress), history.ids)

        return first, lambda token: sampler.choose(runner.decode([token], loops)[0], history.ids)

    def _rest_of_prompt(self) -> tuple[list[int], int, Progress | None]:
        """What is left to run, its loops, and whom to tell; runs first what a failed turn took from the cache."""
        runner, history, progress = self._runner, self._history, self._request.progress
        begin, total = history.cached, len(self._request.prompt) - history.cached

        def report(done: int, _: int) -> None:
            assert progress is not None
            progress(start - begin + done, total)

        told, start = report if progress is not None else None, begin
        for ids, loops in history.lost_chunks():
            runner.prefill(ids, loops, progress=told)
            start = history.cached
        return self._request.prompt[start:], self._request.settings.loops, told


class GenerationStream(Iterator[str]):
    """Pieces of an answer as they come; ``result`` after the last one.

    Making a stream checks everything and moves nothing. With its first piece it takes the session, until it ends, is
    closed or nobody holds it any more; meanwhile every other call on the session is refused with ``BusyError``.

    Left before its end (``close()``, the end of a ``with`` block, an error, Ctrl-C, or since nobody holds it) it leaves
    a usable conversation: before the first new token the one that was before the turn; after it the turn stays, with
    the text so far as the assistant's message, and the next turn goes on from there.
    """

    def __init__(self, turn: Turn):
        self._turn = turn
        self._stepping = Hold("this stream is at work in another thread already: read it from one")
        # The generator refers to the turn, which refers to nothing above it: a stream that nobody holds ends at once.
        self._pieces = turn.run(weakref.ref(self))

    def __next__(self) -> str:
        """The next piece of text, never empty.

        Raises:
            BusyError: the session is at work; the stream may be asked again.
            StreamError: the conversation went on since the stream was made.
            NumericalError: the model computed NaN or infinity.
        """
        with self._stepping.taken():
            try:
                return next(self._pieces)
            except (BusyError, StreamError):
                self._pieces = self._turn.run(weakref.ref(self))  # it did not begin
                raise

    def close(self) -> None:
        """Ends the answer where it stands; nothing happens where it has ended.

        Raises:
            BusyError: another thread is at a piece.
        """
        with self._stepping.taken():
            self._pieces.close()

    def __enter__(self) -> Self:
        """The stream itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes it."""
        self.close()

    @property
    def result(self) -> GenerationResult:
        """The whole answer.

        Raises:
            StreamError: the stream has not ended yet, or was left before its end.
        """
        if self._turn.result is None:
            raise StreamError("the stream has not ended: iterate it to the end before asking for its result")
        return self._turn.result

    def run_to_end(self) -> GenerationResult:
        """The whole answer, without its pieces."""
        with self:
            for _ in self:
                pass
        return self.result
