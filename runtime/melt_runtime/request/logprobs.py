"""What the model itself made of a token and of those that it had in its place."""

from dataclasses import dataclass

import numpy as np

from melt_runtime.memory.plan import Array


@dataclass(frozen=True)
class TokenLogprob:
    """Natural logarithms of probabilities, before processors, bias, penalties and temperature.

    Attributes:
        token_id: the token that was chosen.
        logprob: its own.
        top: the likeliest tokens, as many as were asked for, likeliest first, of equal ones the lower id first.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]

    @classmethod
    def of(cls, logits: Array, token_id: int, count: int) -> "TokenLogprob":
        """Of ``token_id`` among ``logits`` [V], finite in their largest, with ``count`` others."""
        scores = logits.astype(np.float64) - logits.max()
        scores -= np.log(np.exp(scores).sum())
        count = min(count, len(scores))
        near = np.flatnonzero(logits >= np.partition(logits, -count)[-count]) if count else np.empty(0, dtype=np.int64)
        top = near[np.argsort(-logits[near], kind="stable")][:count]
        return cls(token_id, float(scores[token_id]), tuple((int(token), float(scores[token])) for token in top))
