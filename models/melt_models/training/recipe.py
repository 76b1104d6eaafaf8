"""Recipes: every number that decides a training run, from one TOML file. ``melt_models/recipes`` has the ready ones.

A recipe names no paths: teacher, data and output are given to the run, so that a recipe serves any of them.
"""

import math
import tomllib
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, get_origin, get_type_hints

from melt_models.configuration_form import GATE_KINDS
from melt_models.forms import shown
from melt_models.training.errors import TrainingError

_MOST = 10**9
"""Of every whole number."""
PRECISIONS = ("float32", "bfloat16")
SUPERVISED_LOOPS = ("last", "every")


@dataclass(frozen=True)
class Phase:
    """Phase 1 or 2; its loss is the weighted sum of the terms. It leaves the exit gate as it is.

    Attributes:
        steps: optimizer steps; 0 leaves the phase out.
        cross_entropy: weight of the next token's cross entropy after the last loop.
        distillation: weight of the Kullback-Leibler divergence of the student's next-token distribution from the
            teacher's, mean over tokens and supervised loops.
        attention: weight beta of the squared distance between what attention adds to the residual stream in student
            and teacher, summed over D, mean over tokens, layers and loops.
    """

    steps: int
    cross_entropy: float = 0.0
    distillation: float = 0.0
    attention: float = 0.0

    trains_model, trains_exit_gate = True, False

    @property
    def needs_teacher(self) -> bool:
        """Whether a term compares with the teacher."""
        return self.distillation > 0 or self.attention > 0

    @property
    def weights(self) -> dict[str, float]:
        """The loss's terms and the weight of each."""
        return {name: getattr(self, name) for name in ("cross_entropy", "distillation", "attention")}


@dataclass(frozen=True)
class Joint:
    """The whole model together with its exit gate, at all its loops (``training/exit_gate.py``, step one).

    Ouro's ``entropy`` was 0.1, and 0.05 in its later stages. A finished model is in a later one: our recipes have 0.05.
    The exit gate it leaves has no threshold yet: that is the next phase's, whose target knows what a loop costs.

    Attributes:
        steps: optimizer steps.
        learning_rate: AdamW, for the exit gate; the recipe's own rates are those of the model.
        entropy: weight beta of the entropy of where a token leaves, which is taken off the expected cross entropy.
    """

    steps: int
    learning_rate: float
    entropy: float

    trains_model, trains_exit_gate = True, True

    @property
    def weights(self) -> dict[str, float]:
        """The loss's terms and the weight of each."""
        return {"expected_cross_entropy": 1.0, "entropy": -self.entropy}


@dataclass(frozen=True)
class Exit:
    """The exit gate's phase: the model is frozen, the gate learns where a token may leave (the same, step two).

    Attributes:
        steps: optimizer steps.
        learning_rate: AdamW, for the gate.
        margin: nats that each further loop must save of a token's cross entropy to be worth it.
        sharpness: how fast the target turns from leaving to going on around that, in 1 / nats.
        threshold: cumulated exit probability at which a token leaves; goes into the model's configuration.
    """

    steps: int
    learning_rate: float
    margin: float
    sharpness: float
    threshold: float

    trains_model, trains_exit_gate = False, True

    @property
    def weights(self) -> dict[str, float]:
        """The loss's terms and the weight of each."""
        return {"exit": 1.0}


@dataclass(frozen=True)
class Recipe:
    """A run of two phases (arXiv 2605.07721): interpolated transition, then attention-aligned distillation.

    Two more, or the only ones of a recipe, train the exit gate (arXiv 2510.25741): together with the model, then alone.

    Where the papers are silent, and the choice is ours: the loss of phase 1, the attention output (after the norm that
    closes the branch: without it, its scale means nothing), ``supervised_loops``, warm-up and decay, weight decay.

    Attributes:
        chunk_sizes: tokens in parallel; each step draws one. No sequence may be shorter than the largest. 0: whole
            sequences, which is training without chunks.
        batch_size: sequences a step, over all processes.
        micro_batch_size: sequences that one process computes at once.
        transition: phase 1; its alpha goes linearly from 0 in its first step to 1 in its last.
        distillation: phase 2.
        joint: model and exit gate together; None leaves it out.
        exit: the exit gate's phase; None leaves it out.
        base_learning_rate: AdamW, for the LoopLM's weights.
        muon_learning_rate: Muon, for the matrices of the LoopLM's layers; 0: AdamW trains them, too.
        gate_learning_rate: AdamW, for the gates.
        gate_kind: how the latent state is updated, for a student made from the teacher.
        gate_bias_init: initial ``b_z`` of its gates.
        supervised_loops: the loops whose distributions are distilled, ``last`` or ``every``.
        shallow_steps: fraction of steps at a depth drawn below the teacher's, so that the student learns to work at
            fewer loops too; 0 trains one depth, as the paper does.
        deep_steps: fraction of steps of phases 1 and 2 at a depth drawn from the teacher's + 1 to ``most_loops``, which
            the teacher runs, too, so that a loop too many does not walk past the answer.
        most_loops: the deepest of those; 0 where there are none.
        leaving_steps: fraction of steps of phase 2 and of the exit gate's in which supervised tokens leave the loop
            anywhere, drawn, so that the student learns to read the rows that they leave.
        wave_steps: fraction of steps of phase 2 in which the sequences, or their second halves, are read as a wave of a
            lag drawn from 1 to loops - 1, plain decoding, so that the student learns to read rows of neighbours that
            are loops ahead.
        warmup_steps: steps over which the rates rise from 0, anew for the joint phase and the exit gate's.
        decay_steps: steps at the end over which they fall to 0: of phases 1 and 2, the joint one, the exit gate's.
        weight_decay: for matrices of the base; gates, norms and biases have none.
        gradient_clip: largest norm of the gradient.
        precision: ``float32``, or ``bfloat16`` for autocast (weights and optimizer stay float32).
        gradient_checkpointing: compute layers again in the backward pass instead of keeping their insides.
        compile: fuse parts of layers and losses with torch's compiler, which needs a C++ compiler on the CPU.
        checkpoint_every: steps between checkpoints.
        seed: of the gates, the order of the data, and the draws of chunk and depth.
    """

    chunk_sizes: tuple[int, ...]
    batch_size: int
    micro_batch_size: int
    transition: Phase = Phase(0)
    distillation: Phase = Phase(0)
    joint: Joint | None = None
    exit: Exit | None = None
    base_learning_rate: float = 0.0
    muon_learning_rate: float = 0.0
    gate_learning_rate: float = 0.0
    gate_kind: str = "elementwise"
    gate_bias_init: float = -4.0
    supervised_loops: str = "last"
    shallow_steps: float = 0.0
    deep_steps: float = 0.0
    most_loops: int = 0
    leaving_steps: float = 0.0
    wave_steps: float = 0.0
    warmup_steps: int = 0
    decay_steps: int = 0
    weight_decay: float = 0.0
    gradient_clip: float = 1.0
    precision: str = "float32"
    gradient_checkpointing: bool = False
    compile: bool = False
    checkpoint_every: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks every rule and reports all that are broken."""
        faults = _broken_rules(self)
        if faults:
            raise TrainingError("; ".join(faults))

    @property
    def phases(self) -> dict[str, Phase | Joint | Exit]:
        """Those that have steps, by their names and in their order."""
        named = {
            "transition": self.transition,
            "distillation": self.distillation,
            "joint": self.joint,
            "exit": self.exit,
        }
        return {name: phase for name, phase in named.items() if phase is not None and phase.steps}

    @property
    def paired_steps(self) -> int:
        """Optimizer steps of phases 1 and 2, which make a MELT model of a LoopLM."""
        return self.transition.steps + self.distillation.steps

    @property
    def trains_model(self) -> bool:
        """Whether a phase trains more than the exit gate."""
        return self.paired_steps > 0 or self.joint is not None

    @property
    def trains_exit_gate(self) -> bool:
        """Whether a phase trains the exit gate."""
        return self.joint is not None or self.exit is not None

    @property
    def steps(self) -> int:
        """Optimizer steps of all phases."""
        return sum(phase.steps for phase in self.phases.values())

    def phase_of(self, step: int) -> Phase | Joint | Exit:
        """The phase of a step, counted from 0."""
        return self.phases[self.name_of(step)]

    def name_of(self, step: int) -> str:
        """That phase's name."""
        ends = accumulate(phase.steps for phase in self.phases.values())
        return next(name for name, end in zip(self.phases, ends, strict=True) if step < end)

    def alpha_of(self, step: int) -> float | None:
        """MELT's share of keys and values at a step; None later, which has nothing to mix."""
        if step >= self.transition.steps:
            return None
        return step / (self.transition.steps - 1) if self.transition.steps > 1 else 1.0

    def rate_of(self, step: int) -> float:
        """The fraction of the learning rates at a step."""
        parts = (self.paired_steps, self.joint.steps if self.joint else 0, self.exit.steps if self.exit else 0)
        ends = accumulate(parts, initial=0)
        first, end = next((first, end) for first, end in pairwise(ends) if step < end)
        rise = (step - first + 1) / self.warmup_steps if self.warmup_steps else 1.0
        fall = (end - step) / self.decay_steps if self.decay_steps else 1.0
        return min(1.0, rise, fall)


def read_recipe(path: Path) -> Recipe:
    """Reads a recipe.

    Raises:
        TrainingError: no such file, not TOML, an unknown or missing key, a value of another type or outside its rule.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TrainingError(f"recipe {path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # text that is not UTF-8 is a ValueError too
        raise TrainingError(f"recipe {path} is not TOML: {error}") from error
    faults: list[str] = []
    for name in ("transition", "distillation"):
        if isinstance(values.get(name), dict):
            checked = _checked(Phase, values[name], f"{name}.", faults)
            values[name] = Phase(**{"steps": 0, **checked})  # where steps are missing, that is a fault already
    for name, kind in (("joint", Joint), ("exit", Exit)):
        if isinstance(values.get(name), dict):
            checked = _checked(kind, values[name], f"{name}.", faults)
            absent = {field.name: 0 for field in fields(kind)}
            values[name] = kind(**{**absent, **checked})  # the same here
    checked = _checked(Recipe, values, "", faults)
    if faults:
        raise TrainingError(f"recipe {path}: {'; '.join(faults)}")
    try:
        return Recipe(**checked)
    except TrainingError as error:
        raise TrainingError(f"recipe {path}: {error}") from error


def _checked(kind: type, values: dict[str, Any], prefix: str, faults: list[str]) -> dict[str, Any]:
    """The values that have the types of ``kind``'s fields; every other one is a fault more.

    Lists become tuples, and whole numbers floats where a field wants them.
    """
    types = get_type_hints(kind)
    required = [field.name for field in fields(kind) if field.default is MISSING]
    faults += [f"unknown key {prefix}{name}: remove it or correct its spelling" for name in values if name not in types]
    faults += [f"{prefix}{name} is missing" for name in required if name not in values]
    checked = {}
    for name, value in values.items():
        wanted = types.get(name)
        if wanted is float and _is_int(value):
            value = float(value)
        if get_origin(wanted) is tuple and isinstance(value, list):
            value = tuple(value)
        if wanted is not None and _FITS[wanted](value):
            checked[name] = value
        elif wanted is not None:
            faults.append(f"{prefix}{name} must be {_WORDS[wanted]}, got {shown(values[name])}")
    return checked


def _is_int(value: object) -> bool:
    return type(value) is int and abs(value) <= _MOST


_FITS: dict[Any, Callable[[Any], bool]] = {
    int: _is_int,
    float: lambda value: type(value) is float and math.isfinite(value),
    bool: lambda value: type(value) is bool,
    str: lambda value: type(value) is str,
    tuple[int, ...]: lambda value: type(value) is tuple and all(map(_is_int, value)),
    Phase: lambda value: type(value) is Phase,
    Joint | None: lambda value: type(value) is Joint,
    Exit | None: lambda value: type(value) is Exit,
}
_WORDS: dict[Any, str] = {
    int: f"int of at most {_MOST}",
    float: "a finite number",
    bool: "true or false",
    str: "a text",
    tuple[int, ...]: "a list of int",
    Phase: "a table",
    Joint | None: "a table",
    Exit | None: "a table",
}
"""What a field of a type may hold, and how to say it."""


def _broken_rules(recipe: Recipe) -> list[str]:
    faults = []

    def require(holds: bool, name: str, rule: str, value: object) -> None:
        if not holds:
            faults.append(f"{name} must be {rule}, got {shown(value)}")

    for name in ("batch_size", "micro_batch_size", "checkpoint_every"):
        require(getattr(recipe, name) >= 1, name, "at least 1", getattr(recipe, name))
    require(recipe.gradient_clip > 0, "gradient_clip", "above 0", recipe.gradient_clip)
    for name in ("base_learning_rate", "gate_learning_rate"):
        rate = getattr(recipe, name)
        require(rate > 0 if recipe.trains_model else rate == 0, name, _rate_rule(recipe), rate)
    muon = recipe.muon_learning_rate
    rule = "at least 0, and 0 where only the exit gate is trained"
    require(muon == 0 or (muon > 0 and recipe.trains_model), "muon_learning_rate", rule, muon)
    for name in ("warmup_steps", "decay_steps", "weight_decay", "seed"):
        require(getattr(recipe, name) >= 0, name, "at least 0", getattr(recipe, name))
    for name, values in (
        ("gate_kind", tuple(kind for kind in GATE_KINDS if kind != "none")),
        ("supervised_loops", SUPERVISED_LOOPS),
        ("precision", PRECISIONS),
    ):
        require(getattr(recipe, name) in values, name, f"one of {', '.join(values)}", getattr(recipe, name))
    sizes = recipe.chunk_sizes
    require(bool(sizes) and min(sizes) >= 0, "chunk_sizes", "one or more numbers of at least 0", list(sizes))
    for name in ("shallow_steps", "deep_steps", "leaving_steps", "wave_steps"):
        require(0 <= getattr(recipe, name) <= 1, name, "in [0, 1]", getattr(recipe, name))
    depths = recipe.shallow_steps + recipe.deep_steps
    require(depths <= 1, "shallow_steps + deep_steps", "at most 1", depths)
    if recipe.leaving_steps > 0:
        held = recipe.distillation.steps > 0 or recipe.exit is not None
        rule = "left out where neither phase 2 nor the exit gate's is"
        require(held, "leaving_steps", rule, recipe.leaving_steps)
    if recipe.wave_steps > 0:
        held = recipe.distillation.steps > 0 and recipe.gate_kind != "mean"
        require(held, "wave_steps", "left out without phase 2, and for the gate kind mean", recipe.wave_steps)
    if recipe.deep_steps > 0:
        rule = "given where deep_steps is above 0, above the model's loops"
        require(recipe.paired_steps > 0, "deep_steps", "left out where phases 1 and 2 are", recipe.deep_steps)
        require(recipe.most_loops > 0, "most_loops", rule, recipe.most_loops)
    else:
        require(recipe.most_loops == 0, "most_loops", "left out where deep_steps is 0", recipe.most_loops)
    if recipe.micro_batch_size >= 1:
        whole = recipe.batch_size % recipe.micro_batch_size == 0
        require(whole, "batch_size", f"a multiple of micro_batch_size {recipe.micro_batch_size}", recipe.batch_size)
    for name in ("transition", "distillation"):
        phase = getattr(recipe, name)
        require(phase.steps >= 0, f"{name}.steps", "at least 0", phase.steps)
        weights = tuple(phase.weights.values())
        require(all(weight >= 0 for weight in weights), name, "made of weights of at least 0", weights)
        require(not phase.steps or max(weights) > 0, name, "given a term with a weight above 0", weights)
    if recipe.joint is None and recipe.exit is None:
        require(recipe.steps >= 1, "transition.steps + distillation.steps", "at least 1", recipe.steps)
    if recipe.joint is not None:
        for name in ("learning_rate", "entropy"):
            require(getattr(recipe.joint, name) > 0, f"joint.{name}", "above 0", getattr(recipe.joint, name))
        require(recipe.joint.steps >= 1, "joint.steps", "at least 1", recipe.joint.steps)
    if recipe.exit is not None:
        require(recipe.exit.steps >= 1, "exit.steps", "at least 1", recipe.exit.steps)
        for name in ("learning_rate", "sharpness"):
            require(getattr(recipe.exit, name) > 0, f"exit.{name}", "above 0", getattr(recipe.exit, name))
        require(recipe.exit.margin >= 0, "exit.margin", "at least 0", recipe.exit.margin)
        require(0 < recipe.exit.threshold < 1, "exit.threshold", "above 0 and below 1", recipe.exit.threshold)
    return faults


def _rate_rule(recipe: Recipe) -> str:
    return "above 0" if recipe.trains_model else "left out where only the exit gate is trained"
