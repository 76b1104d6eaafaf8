"""``GenerationConfig``: owns every default of generation; API, command line and bundle all read it."""

import json
import math
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from melt_runtime.errors import BundleError


@dataclass(frozen=True)
class GenerationConfig:
    """How to continue a prompt.

    Attributes:
        max_new_tokens: most tokens to generate, at least 1.
        loops: depth T for prompt and answer; None: as many as the model was trained with.
        temperature: 0 is greedy, the default; above, logits are divided by it.
        top_k: keep the k most probable tokens; 0: all.
        top_p: keep the most probable tokens until their probabilities reach this sum, in (0, 1].
        min_p: keep tokens at least this fraction as probable as the most probable one, in [0, 1].
        repetition_penalty: above 1 lowers the logits of tokens that already stand in the context (arXiv 1909.05858).
        seed: of the random choice; None: a new one each time.
        stop: strings that end generation; they are not part of the text.
        stop_ids: tokens that end generation; a bundle brings its model's end-of-text tokens.
    """

    max_new_tokens: int = 256
    loops: int | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Checks every field.

        Raises:
            ValueError: lists every value outside its rule.
        """
        rules = (
            ("max_new_tokens", "at least 1", self.max_new_tokens >= 1),
            ("loops", "at least 1", self.loops is None or self.loops >= 1),
            ("temperature", "at least 0 and finite", 0 <= self.temperature < math.inf),
            ("top_k", "at least 0", self.top_k >= 0),
            ("top_p", "in (0, 1]", 0 < self.top_p <= 1),
            ("min_p", "in [0, 1]", 0 <= self.min_p <= 1),
            ("repetition_penalty", "above 0 and finite", 0 < self.repetition_penalty < math.inf),
            ("seed", "at least 0", self.seed is None or self.seed >= 0),
            ("stop", "a sequence of non-empty strings", not isinstance(self.stop, str) and all(self.stop)),
            ("stop_ids", "at least 0", all(token >= 0 for token in self.stop_ids)),
        )
        faults = [f"{name} must be {rule}, got {getattr(self, name)!r}" for name, rule, holds in rules if not holds]
        if faults:
            raise ValueError("; ".join(faults))

    def with_changes(self, **changes: Any) -> "GenerationConfig":
        """A copy with some fields changed.

        Raises:
            ValueError: an unknown field or a value outside its rule.
        """
        known = [field.name for field in fields(self)]
        unknown = sorted(changes.keys() - set(known))
        if unknown:
            raise ValueError(f"unknown generation options {unknown}; known: {', '.join(known)}")
        return replace(self, **changes)


def write_generation_config(path: Path, config: GenerationConfig) -> None:
    """Writes ``generation_config.json``."""
    path.write_text(json.dumps(asdict(config), indent=2) + "\n", encoding="utf-8")


def read_generation_config(path: Path) -> GenerationConfig:
    """Reads ``generation_config.json``.

    Raises:
        BundleError: not an object, unknown keys, or values outside their rule.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("it must hold a JSON object")
        for name in ("stop", "stop_ids"):
            if name in values:
                values[name] = tuple(values[name])
        return GenerationConfig().with_changes(**values)
    except (TypeError, ValueError) as error:
        raise BundleError(f"{path.name}: {error}") from error
