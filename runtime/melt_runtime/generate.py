"""One answer: prefill, then decode token by token, to streamed text and a result with its costs."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from melt_runtime.generation_config import GenerationConfig
from melt_runtime.loop import LoopRunner, check_ids
from melt_runtime.sampler import Sampler
from melt_runtime.text import StopMatcher, TextCodec

FinishReason = Literal["stop", "length"]
"""``stop``: a stop token or stop string; ``length``: ``max_new_tokens`` were generated."""


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


class TokenHistory:
    """The tokens of one sequence, of which the first ``cached`` are in the cache."""

    def __init__(self, runner: LoopRunner):
        self._runner = runner
        self.ids: list[int] = []
        self.turn = 0

    @property
    def cached(self) -> int:
        """Tokens whose final keys and values are in the cache."""
        return int(self._runner.state.lengths[0])

    def shared_with(self, prompt: Sequence[int]) -> int:
        """Cached tokens that ``prompt`` begins with, in whole chunks.

        The prompt's last token never counts, since its logits are needed.
        """
        limit = min(self.cached, len(prompt) - 1)
        shared = next((place for place in range(limit) if self.ids[place] != prompt[place]), limit)
        return self._runner.state.whole_chunks(shared)

    def become(self, prompt: Sequence[int], kept: int) -> None:
        """Sets the history to ``prompt`` and forgets cached tokens beyond the first ``kept``."""
        self._runner.state.truncate(kept)
        self.ids = list(prompt)
        self.turn += 1


class GenerationStream(Iterator[str]):
    """Pieces of an answer as they come; ``result`` after the last one, when ``on_end`` is called with it too.

    Checks come before any computation: the constructor raises, and then nothing has changed.

    Raises:
        TokenError: an empty prompt or ids outside the vocabulary.
        CapacityError: prompt and ``max_new_tokens`` do not fit.
        ValueError: a number of loops that the state cannot run.
    """

    def __init__(
        self,
        runner: LoopRunner,
        codec: TextCodec,
        history: TokenHistory,
        prompt: Sequence[int],
        config: GenerationConfig,
        on_end: Callable[["GenerationResult"], None],
    ):
        shape = runner.state.plan.shape
        self._runner, self._history, self._config = runner, history, config
        self._loops = shape.trained_loops if config.loops is None else config.loops
        self._prompt = check_ids(prompt, shape).tolist()
        # The last new token is never run, so it takes no row.
        runner.state.require_total(len(self._prompt) + config.max_new_tokens - 1)
        self._kept = history.shared_with(self._prompt)
        runner.state.require_loops(self._loops, self._kept)
        history.become(self._prompt, self._kept)
        self._turn = history.turn
        self._decoder, self._stops = codec.stream(), StopMatcher(config.stop)
        self._pieces = self._run()
        self._result: GenerationResult | None = None
        self._text: list[str] = []
        self._on_end = on_end

    def __next__(self) -> str:
        """The next piece of text, never empty."""
        piece = next(self._pieces)
        self._text.append(piece)
        return piece

    @property
    def result(self) -> GenerationResult:
        """The whole answer.

        Raises:
            RuntimeError: the stream has not ended yet.
        """
        if self._result is None:
            raise RuntimeError("the stream has not ended: iterate it to the end before asking for its result")
        return self._result

    def _run(self) -> Iterator[str]:
        history = self._history
        prefill, decode = self._choosers()
        self._require_turn()
        started = time.perf_counter()
        token = prefill(self._prompt[self._kept :])
        prefill_seconds, decode_seconds = time.perf_counter() - started, 0.0
        new_ids: list[int] = []
        finish: FinishReason = "length"
        while True:
            new_ids.append(token)
            history.ids.append(token)
            if token in self._config.stop_ids:
                finish = "stop"
                break
            if piece := self._stops.push(self._decoder.push(token)):
                yield piece
            if self._stops.found is not None:
                finish = "stop"
                break
            if len(new_ids) == self._config.max_new_tokens:
                break
            self._require_turn()
            started = time.perf_counter()
            token = decode(token)
            decode_seconds += time.perf_counter() - started
        if piece := self._stops.flush():
            yield piece
        self._result = GenerationResult(
            text="".join(self._text),
            token_ids=tuple(new_ids),
            finish_reason=finish,
            loops=self._loops,
            prompt_tokens=len(self._prompt),
            cached_tokens=self._kept,
            timings=Timings(
                prefill_seconds=prefill_seconds,
                prefill_tokens=len(self._prompt) - self._kept,
                decode_seconds=decode_seconds,
                decode_tokens=len(new_ids) - 1,
            ),
            state_bytes=self._runner.state.nbytes,
        )
        self._on_end(self._result)

    def _choosers(self) -> tuple[Callable[[Sequence[int]], int], Callable[[int], int]]:
        """What runs the prompt, and what runs a token, each up to the next token: drawn on the device where its sampler
        does what the settings ask for, else on the host."""
        runner, loops, history = self._runner, self._loops, self._history
        if runner.sampler is not None and runner.sampler.can_draw(self._config):
            runner.sampler.start(self._config)
            return lambda ids: runner.prefill_and_draw(ids, loops), lambda token: runner.decode_and_draw(token, loops)
        sampler = Sampler(self._config)
        return (
            lambda ids: sampler.choose(runner.prefill(ids, loops), history.ids),
            lambda token: sampler.choose(runner.decode([token], loops)[0], history.ids),
        )

    def _require_turn(self) -> None:
        """Refuses to go on over a cache that holds another turn."""
        if self._history.turn != self._turn:
            raise RuntimeError("another turn began, or a reset, before the stream ended: use a session for each")
