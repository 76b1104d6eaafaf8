"""What comes of a request: the answer, and what it cost."""

from collections import Counter
from dataclasses import dataclass
from typing import Literal

from melt_runtime.request.logprobs import TokenLogprob
from melt_runtime.schedule.wave import Drafts

FinishReason = Literal["stop", "length", "cancelled"]
"""``stop``: a stop token or stop string; ``length``: ``max_new_tokens`` were generated, or the state is full;
``cancelled``: it was cancelled before its end."""


@dataclass(frozen=True)
class Timings:
    """Seconds of computation and tokens of the two phases; the first new token comes out of prefill.

    In a batch they are those of every pass that was run meanwhile, whoever's tokens were in it.
    """

    prefill_seconds: float
    prefill_tokens: int
    decode_seconds: float
    decode_tokens: int

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens per second; 0 where none was computed, and no time taken."""
        return self.prefill_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_rate(self) -> float:
        """Tokens per second in decode; 0 where the answer was a single token."""
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else 0.0


@dataclass(frozen=True)
class GenerationResult:
    """An answer.

    Attributes:
        text: without stop string and special tokens.
        token_ids: every token generated, the stop token included.
        finish_reason: ``stop``, ``length`` or ``cancelled``.
        loops: depth T it was made with, the most where a rule decided.
        loops_per_token: after how many loops each new token was chosen; the first by the prompt's last chunk.
        prompt_tokens: tokens of the prompt, of which ``cached_tokens`` were in the cache already.
        timings: seconds and tokens of prefill and decode.
        state_bytes: bytes of the whole state, cache included.
        passes: runs of the loop graph with tokens of the answer; in a batch others share them.
        logprobs: of each new token, what the model made of it, where ``logprobs`` asked for that; else None.
        drafts: of wave decoding, what became of the tokens that started before they were known; else None.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    loops: int
    loops_per_token: tuple[int, ...]
    prompt_tokens: int
    cached_tokens: int
    timings: Timings
    state_bytes: int
    passes: int
    drafts: Drafts | None
    logprobs: tuple[TokenLogprob, ...] | None = None

    @property
    def depth_histogram(self) -> dict[int, int]:
        """How many tokens were chosen after how many loops."""
        return dict(sorted(Counter(self.loops_per_token).items()))
