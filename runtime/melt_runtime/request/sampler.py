"""Chooses the next token from logits on the host. Knows nothing of models or text."""

import math
from collections.abc import Sequence

import numpy as np

from melt_runtime.arguments import shown
from melt_runtime.errors import NumericalError
from melt_runtime.memory.plan import Array
from melt_runtime.request.settings import GenerationSettings


class Sampler:
    """Applies processors, bias, penalties, temperature, top-k, top-p and min-p, in this order, and draws."""

    def __init__(self, settings: GenerationSettings, prompt_tokens: int = 0):
        """Takes the settings and where the answer begins in what it is given of the context."""
        self.settings, self._prompt_tokens = settings, prompt_tokens
        self._bias = np.array([*settings.logit_bias.values()], dtype=np.float32), [*settings.logit_bias]
        self._random = np.random.default_rng(settings.seed)
        self._noise: list[float] = []

    def choose(self, logits: Array, context: Sequence[int], place: int) -> int:
        """The next token.

        What is drawn belongs to its place: the same place with the same logits gives the same token again.

        Args:
            logits: [V] float32; not changed.
            context: token ids so far, prompt and answer.
            place: of the token in the answer, counted from 0.

        Raises:
            NumericalError: the logits hold NaN or infinity, or nothing above minus infinity.
            ValueError: a processor gave something else than logits, or left no token.
        """
        best = int(logits.argmax())  # NaN counts as the largest
        if not math.isfinite(logits[best]):
            raise NumericalError(
                f"the model gave logits of {logits[best]}: export it again, in float32 if it was float16"
            )
        settings = self.settings
        if settings.reads_answer or settings.logit_bias:
            logits = self._changed(logits, context)
            best = int(logits.argmax())
        if settings.temperature == 0:
            return best
        tokens, probabilities = candidates(logits, settings)
        edges = probabilities.cumsum()
        edges /= edges[-1]
        while len(self._noise) <= place:
            self._noise.append(self._random.random())
        return int(tokens[edges.searchsorted(self._noise[place], side="right")])

    def _changed(self, logits: Array, context: Sequence[int]) -> Array:
        """The logits that the choice is made from."""
        settings, answer = self.settings, context[self._prompt_tokens :]
        for processor in settings.logits_processors:
            logits = _checked(processor(answer, logits.copy()), logits.shape)
        if settings.logit_bias:
            biases, tokens = self._bias
            logits = logits.copy()
            logits[tokens] += biases
        if settings.repetition_penalty != 1 and context:
            logits = penalize(logits, context, settings.repetition_penalty)
        if (settings.presence_penalty or settings.frequency_penalty) and answer:
            seen, counts = np.unique(np.asarray(answer), return_counts=True)
            logits = logits.copy()
            logits[seen] -= settings.presence_penalty + settings.frequency_penalty * counts.astype(np.float32)
        return logits


def _checked(given: object, shape: tuple[int, ...]) -> Array:
    """What a processor gave, where logits can be chosen from."""
    if not isinstance(given, np.ndarray) or given.shape != shape or not np.issubdtype(given.dtype, np.floating):
        raise ValueError(f"logits_processors must give float logits {list(shape)}, got {shown(given)}")
    largest = given.max()
    if not np.isfinite(largest):  # NaN is the largest where there is one
        raise ValueError(f"logits_processors must leave a token that may be chosen, the largest logit is {largest}")
    return given.astype(np.float32, copy=False)


def penalize(logits: Array, context: Sequence[int], penalty: float) -> Array:
    """Divides positive and multiplies negative logits of tokens in ``context`` by ``penalty`` (arXiv 1909.05858)."""
    seen = np.unique(np.asarray(context))
    scores: Array = logits.copy()
    with np.errstate(over="ignore"):
        changed = np.where(scores[seen] > 0, scores[seen] / penalty, scores[seen] * penalty)
    scores[seen] = np.nan_to_num(changed)  # the largest number in place of infinity
    return scores


def candidates(logits: Array, settings: GenerationSettings) -> tuple[Array, Array]:
    """Tokens that top-k, top-p and min-p leave, ascending, and their probabilities.

    Of equally probable tokens at the edge of top-k or top-p those with the lower ids stay. Nothing is sorted but, for
    top-p, the logits of tokens that can be within it.

    Args:
        logits: [V], finite in its largest.
        settings: with a temperature above 0.

    Returns:
        Token ids [n] and probabilities [n] float64 that sum to 1.
    """
    scores = (logits.astype(np.float64) - logits.max()) / settings.temperature
    tokens = np.arange(len(scores))
    if 0 < settings.top_k < len(scores):
        tokens = _largest(scores, float(np.partition(scores, -settings.top_k)[-settings.top_k]), settings.top_k)
    weights = np.exp(scores[tokens])
    total = weights.sum()
    probabilities = weights / total
    if settings.top_p < 1:
        # All tokens below this weigh less than top_p leaves out, half of it kept for rounding.
        floor = (1 - settings.top_p) / (2 * len(tokens))
        ranked = np.sort(scores[tokens[probabilities >= floor]])[::-1]
        ordered = np.exp(ranked) / total
        count = int(np.count_nonzero(ordered.cumsum() - ordered < settings.top_p))  # the one that crosses it stays
        tokens = tokens[_largest(scores[tokens], float(ranked[count - 1]), count)]
        probabilities = np.exp(scores[tokens]) / total
    kept = probabilities >= settings.min_p * probabilities.max()
    tokens, probabilities = tokens[kept], probabilities[kept]
    return tokens, probabilities / probabilities.sum()


def _largest(scores: Array, least: float, count: int) -> Array:
    """Places, ascending, of the ``count`` largest ``scores``, of equal ones the first; ``least`` is the smallest."""
    chosen = scores > least
    chosen[np.flatnonzero(scores == least)[: count - np.count_nonzero(chosen)]] = True
    return np.flatnonzero(chosen)
