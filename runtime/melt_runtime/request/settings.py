"""What holds of an answer in the end: caller over bundle over project, merged in one place."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from melt_runtime.arguments import shown
from melt_runtime.request.generation_config import (
    GENERAL_DEFAULTS,
    OF_AUTO,
    OF_GRAMMAR,
    Decoding,
    GenerationConfig,
    LogitsProcessor,
)
from melt_runtime.schedule.depth import Depth, ExitRule

SETTLED_THRESHOLD = 0.05
"""How much the likeliest token's probability may move in a loop that changed nothing, where nobody says."""


@dataclass(frozen=True)
class GenerationSettings:
    """A ``GenerationConfig`` in which everything is said, made by ``settle``; ``seed`` may still be None.

    ``lag`` is that of a wave; None: plain decoding.
    """

    max_new_tokens: int
    depth: Depth
    lag: int | None
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    logits_processors: tuple[LogitsProcessor, ...]
    logprobs: int | None
    seed: int | None
    stop: tuple[str, ...]
    stop_ids: tuple[int, ...]

    @property
    def loops(self) -> int:
        """Most loops that a token takes."""
        return self.depth.most

    @property
    def reads_answer(self) -> bool:
        """Whether a choice depends on the tokens before it otherwise than through the logits."""
        return (
            self.repetition_penalty != 1
            or self.presence_penalty != 0
            or self.frequency_penalty != 0
            or bool(self.logits_processors)
        )

    @property
    def is_plain_choice(self) -> bool:
        """Whether temperature, top-k and top-p are all that is asked of a choice."""
        return not self.reads_answer and self.min_p == 0 and not self.logit_bias and self.logprobs is None


def settle(
    said: GenerationConfig, bundle: GenerationConfig, trained_loops: int, room: int, has_exit_gate: bool = False
) -> GenerationSettings:
    """The merge: what the caller says, else the bundle, else the project.

    Args:
        said: by the caller.
        bundle: the bundle's defaults.
        trained_loops: depth where nobody says one.
        room: tokens that fit after the prompt; where the caller says no number, no more are generated.
        has_exit_gate: whether the model has one.

    Raises:
        ValueError: what is said of the depth contradicts itself, or the model.
    """
    merged = said.over(bundle).over(GENERAL_DEFAULTS)
    values = {field.name: getattr(merged, field.name) for field in fields(merged)}
    depth = {name: values.pop(name) for name in ("loops", *OF_AUTO)}
    decode, lag = values.pop("decode"), values["lag"]
    for name in OF_GRAMMAR:  # the desk compiles it
        values.pop(name)
    values["depth"] = settled = _settle_depth(said, bundle, depth, trained_loops, has_exit_gate)
    values["lag"] = _settle_lag(said, decode, lag, settled)
    if said.max_new_tokens is None:
        values["max_new_tokens"] = room if bundle.max_new_tokens is None else min(bundle.max_new_tokens, room)
    return GenerationSettings(**values)


def _settle_depth(
    said: GenerationConfig, bundle: GenerationConfig, merged: dict[str, Any], trained_loops: int, has_exit_gate: bool
) -> Depth:
    loops = trained_loops if merged["loops"] is None else merged["loops"]
    if loops != "auto":
        idle = [name for name in OF_AUTO if getattr(said, name) is not None]
        if idle:
            raise ValueError(f"{', '.join(idle)} must go with loops='auto', got loops={loops}")
        return Depth.fixed(loops)
    most = trained_loops if merged["max_loops"] is None else merged["max_loops"]
    least = 1 if merged["min_loops"] is None else merged["min_loops"]
    if least > most:
        raise ValueError(f"min_loops must be at most max_loops ({most}), got {least}")
    rule: ExitRule = merged["exit_rule"] or ("settled" if bundle.exit_threshold is None else "gate")
    # The bundle's threshold is its gate's: another rule has none of it.
    threshold = said.exit_threshold if rule == "settled" else merged["exit_threshold"]
    if rule == "gate" and not has_exit_gate:
        raise ValueError("exit_rule must be 'settled', got 'gate': this model has no exit gate")
    if rule == "gate" and threshold is None:
        raise ValueError(
            "exit_rule must be 'settled', got 'gate': this bundle's exit gate was not trained; give exit_threshold to "
            "use it all the same"
        )
    return Depth(most, least, rule, SETTLED_THRESHOLD if threshold is None else threshold)


def _settle_lag(said: GenerationConfig, decode: Decoding | None, lag: int | None, depth: Depth) -> int | None:
    if decode != "wave":
        if said.lag is not None:
            raise ValueError(f"lag must go with decode='wave', got lag={lag}")
        return None
    if depth.most < 2:
        raise ValueError("decode must be 'plain' with one loop, got 'wave': a wave needs two loops at least")
    if lag is not None and lag >= depth.most:
        raise ValueError(f"lag must be below the loops ({depth.most}), got {lag}")
    return 1 if lag is None else lag


def describe_defaults(bundle: GenerationConfig, trained_loops: int) -> dict[str, str]:
    """What holds for each field where a caller says nothing, with whose word it is; for people."""
    merged = bundle.over(GENERAL_DEFAULTS)
    unsaid = {
        "max_new_tokens": "what is left of the capacity",
        "loops": f"{trained_loops}, as trained",
        "exit_rule": "settled" if bundle.exit_threshold is None else "gate",
        "exit_threshold": f"{SETTLED_THRESHOLD:g}",
        "min_loops": "1",
        "max_loops": f"{trained_loops}, as trained",
        "decode": "plain",
        "lag": "1",
        "logprobs": "none",
        "seed": "a new one each time",
    }
    described = {}
    for name in (field.name for field in fields(merged) if field.name not in ("logits_processors", *OF_GRAMMAR)):
        value = getattr(merged, name)
        text = unsaid[name] if value is None else shown(value)
        described[name] = text if getattr(bundle, name) is None else f"{text} (the bundle's)"
    return described
