"""The two models of a run: a frozen LoopLM, and the MELT model that starts as its copy."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from melt_models.checkpoint import CheckpointError, load_checkpoint
from melt_models.configuration import MeltConfig
from melt_models.convert import as_melt, new_gates
from melt_models.modeling import MeltCausalLM
from melt_models.training.errors import TrainingError
from melt_models.training.recipe import Recipe

_NAMES = ("_name_or_path", "architectures", "transformers_version")
_OWN = ("gate_kind", "gate_bias_init", "gate_ema", "chunk_size", "dtype")
"""What may differ between a student and its teacher."""


@dataclass(frozen=True)
class Pair:
    """Teacher and student, and the type in which the teacher's weights are stored."""

    teacher: MeltCausalLM
    student: MeltCausalLM
    stored: torch.dtype


def load_pair(teacher_folder: Path, student_folder: Path | None, recipe: Recipe) -> Pair:
    """Loads the teacher, and makes the student from it or loads one; the student's weights are float32.

    Args:
        teacher_folder: a LoopLM checkpoint.
        student_folder: a MELT checkpoint of the teacher's shape to go on from; None: the teacher with new gates.

    Raises:
        TrainingError: a checkpoint that cannot be loaded, a teacher that is no LoopLM, or a student of another shape
            or gate kind.
    """
    try:
        teacher = load_checkpoint(teacher_folder)
        given = None if student_folder is None else load_checkpoint(student_folder)
    except CheckpointError as error:
        raise TrainingError(str(error)) from error
    if teacher.config.gate_kind != "none" or teacher.config.total_ut_steps < 2:
        raise TrainingError(
            f"teacher {teacher_folder} must be a LoopLM, got gate_kind {teacher.config.gate_kind!r} and total_ut_steps "
            f"{teacher.config.total_ut_steps}: give a LoopLM checkpoint such as Ouro"
        )
    if given is None:
        return Pair(teacher, _from_teacher(teacher, recipe), teacher.dtype)
    faults = _differences(teacher.config, given.config)
    if given.config.gate_kind != recipe.gate_kind:
        faults.append(f"gate_kind {given.config.gate_kind!r}, recipe {recipe.gate_kind!r}")
    if faults:
        raise TrainingError(
            f"student {student_folder} does not fit teacher {teacher_folder}: {'; '.join(faults)}. Give a student "
            "that was made from this teacher, or none to have one made"
        )
    return Pair(teacher, given.float(), teacher.dtype)


def _from_teacher(teacher: MeltCausalLM, recipe: Recipe) -> MeltCausalLM:
    """The teacher's weights with new gates; a MELT model that prefills in the recipe's largest chunk."""
    changes = {"gate_kind": recipe.gate_kind, "gate_bias_init": recipe.gate_bias_init}
    if max(recipe.chunk_sizes):
        changes["chunk_size"] = max(recipe.chunk_sizes)
    config = as_melt(teacher.config, **changes)
    student = MeltCausalLM(config).float()
    student.load_state_dict({**teacher.state_dict(), **new_gates(config, torch.float32, recipe.seed)})
    return student


def _differences(teacher: MeltConfig, student: MeltConfig) -> list[str]:
    theirs, ours = values_of(teacher), values_of(student)
    return [
        f"{name} {ours.get(name)!r}, teacher {theirs.get(name)!r}"
        for name in sorted({*theirs, *ours} - {*_OWN})
        if theirs.get(name) != ours.get(name)
    ]


def values_of(config: MeltConfig) -> dict[str, Any]:
    """Every value of a configuration, without the names of paths, classes and versions."""
    return {name: value for name, value in config.to_dict().items() if name not in _NAMES}
