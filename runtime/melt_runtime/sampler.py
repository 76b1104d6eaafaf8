"""Chooses the next token from logits on the host. Knows nothing of models or text."""

from collections.abc import Sequence

import numpy as np

from melt_runtime.errors import NumericalError
from melt_runtime.generation_config import GenerationConfig
from melt_runtime.state import Array


class Sampler:
    """Applies repetition penalty, temperature, top-k, top-p and min-p, in this order, and draws."""

    def __init__(self, config: GenerationConfig):
        self.config = config
        self._random = np.random.default_rng(config.seed)

    def choose(self, logits: Array, context: Sequence[int]) -> int:
        """The next token.

        Args:
            logits: [V] float32; not changed.
            context: token ids so far, for the repetition penalty.

        Raises:
            NumericalError: the logits hold NaN.
        """
        if np.isnan(logits).any():
            raise NumericalError("the model gave NaN logits: export it again, in float32 if it was float16")
        config = self.config
        scores = penalize(logits, context, config.repetition_penalty)
        if config.temperature == 0:
            return int(scores.argmax())
        probabilities = filtered_probabilities(scores, config)
        return int(self._random.choice(len(probabilities), p=probabilities))


def penalize(logits: Array, context: Sequence[int], penalty: float) -> Array:
    """Divides positive and multiplies negative logits of tokens in ``context`` by ``penalty`` (arXiv 1909.05858)."""
    if penalty == 1 or not context:
        return logits
    seen = np.unique(np.asarray(context))
    scores: Array = logits.copy()
    scores[seen] = np.where(scores[seen] > 0, scores[seen] / penalty, scores[seen] * penalty)
    return scores


def filtered_probabilities(logits: Array, config: GenerationConfig) -> Array:
    """Probabilities after temperature, top-k, top-p and min-p, [V] float64, summing to 1."""
    scaled = (logits.astype(np.float64) - logits.max()) / config.temperature
    order = np.argsort(-scaled, kind="stable")
    probabilities = np.exp(scaled[order])
    if 0 < config.top_k < len(order):
        probabilities[config.top_k :] = 0
    probabilities /= probabilities.sum()
    if config.top_p < 1:
        before = np.cumsum(probabilities) - probabilities  # the token that crosses top_p stays
        probabilities[before >= config.top_p] = 0
    probabilities[probabilities < config.min_p * probabilities[0]] = 0
    result: Array = np.empty_like(probabilities)
    result[order] = probabilities / probabilities.sum()
    return result
