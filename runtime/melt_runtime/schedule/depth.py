"""How many loops tokens take: a number, or a rule that lets them leave when the answer stands."""

import math
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import numpy as np

from melt_runtime.memory.plan import Array

ExitRule = Literal["gate", "settled"]
"""``gate``: the model's exit gate says so; ``settled``: the choice and its probability stopped moving."""
EXIT_RULES = get_args(ExitRule)


@dataclass(frozen=True)
class Depth:
    """What decides how many loops tokens take.

    Attributes:
        most: loops after which they leave whatever a rule says.
        least: loops before which no rule is asked; ``most`` where there is none.
        rule: who decides in between; None: nobody, all take ``most``.
        threshold: of the rule.
    """

    most: int
    least: int
    rule: ExitRule | None = None
    threshold: float = 0.0

    @classmethod
    def fixed(cls, loops: int) -> "Depth":
        """Always the same number."""
        return cls(loops, loops)

    def exit(self) -> "Exit | None":
        """What decides for a token whose prediction counts; None: it takes ``most``.

        The tokens of a prompt before its last predict nothing that could settle, and an exit gate learns on answers:
        they take ``most``.
        """
        if self.rule == "gate":
            return GateExit(self)
        return SettledExit(self) if self.rule == "settled" else None


class Exit(Protocol):
    """Decides when a token leaves.

    Attributes:
        reads: what it looks at after a loop.
    """

    reads: Literal["exit logit", "logits"]

    def wants(self, loops: int) -> bool:
        """Whether it must see what the last of ``loops`` loops left."""

    def leaves(self, loops: int, values: Array) -> bool:
        """Whether the token leaves after ``loops`` loops; asked once after each that it wants."""


class GateExit:
    """Ouro's rule (arXiv 2510.25741): leave when the cumulated exit probability reaches the threshold.

    lambda_t = sigmoid(exit logit), p_t = lambda_t * prod_{s<t} (1 - lambda_s); their sum is 1 - prod (1 - lambda).
    """

    reads: Literal["exit logit", "logits"] = "exit logit"

    def __init__(self, depth: Depth):
        self._depth = depth
        self._stays = 1.0

    def wants(self, loops: int) -> bool:
        """Every loop counts."""
        return True

    def leaves(self, loops: int, values: Array) -> bool:
        """``values``: the exit logit, [1]."""
        self._stays /= 1 + math.exp(min(float(values[0]), 700.0))  # 1 - sigmoid, which never overflows
        return loops >= self._depth.least and 1 - self._stays >= self._depth.threshold


class SettledExit:
    """Leave when a loop changed neither the likeliest token nor, by more than the threshold, its probability.

    Needs no training, and two loops at least. The head runs after every loop that is looked at.
    """

    reads: Literal["exit logit", "logits"] = "logits"

    def __init__(self, depth: Depth):
        self._depth = depth
        self._last: tuple[int, float] | None = None

    def wants(self, loops: int) -> bool:
        """From the loop before the first after which it may leave."""
        return loops >= self._depth.least - 1

    def leaves(self, loops: int, values: Array) -> bool:
        """``values``: logits, [V]."""
        choice = int(values.argmax())
        probability = 1 / float(np.exp(values - values[choice], dtype=np.float64).sum())
        last, self._last = self._last, (choice, probability)
        if last is None or loops < self._depth.least or not math.isfinite(probability):
            return False
        return last[0] == choice and abs(probability - last[1]) <= self._depth.threshold
