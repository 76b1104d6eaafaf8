"""The models of a run: a frozen LoopLM and the MELT model that starts as its copy, or a finished one by itself."""

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
_OWN = ("gate_kind", "gate_bias_init", "gate_ema", "chunk_size", "dtype", "early_exit_threshold")
"""What may differ between a student and its teacher."""


@dataclass(frozen=True)
class Pair:
    """Teacher and student.

    Attributes:
        teacher: a LoopLM; None where no phase learns from one.
        student: in float32.
        stored: the type in which the weights were stored, and are to be in the end.
        folder: whose tokenizer and other texts belong to the student.
    """

    teacher: MeltCausalLM | None
    student: MeltCausalLM
    stored: torch.dtype
    folder: Path


def load_pair(teacher_folder: Path | None, student_folder: Path | None, recipe: Recipe) -> Pair:
    """Loads the teacher, and makes the student from it or loads one; without phases 1 and 2, only the student.

    Args:
        teacher_folder: a LoopLM checkpoint; None where the recipe has neither phase 1 nor 2.
        student_folder: a MELT checkpoint of the teacher's shape to go on from; None: the teacher with new gates.

    Raises:
        TrainingError: a checkpoint that cannot be loaded or is missing, a teacher that is no LoopLM or is not needed, a
            student of another shape or gate kind, or one without loops or exit gate where the gate is to be trained,
            or a recipe whose ``most_loops`` are not more than the teacher's loops.
    """
    if not recipe.paired_steps:
        return _load_alone(teacher_folder, student_folder)
    if teacher_folder is None:
        raise TrainingError(
            "--teacher is missing: this recipe has phases that learn from a LoopLM, give its checkpoint"
        )
    teacher, given = _load(teacher_folder), None if student_folder is None else _load(student_folder)
    if recipe.trains_exit_gate:
        _require_exit_gate(teacher_folder, teacher.config)
    if teacher.config.gate_kind != "none" or teacher.config.total_ut_steps < 2:
        raise TrainingError(
            f"teacher {teacher_folder} must be a LoopLM, got gate_kind {teacher.config.gate_kind!r} and total_ut_steps "
            f"{teacher.config.total_ut_steps}: give a LoopLM checkpoint such as Ouro"
        )
    if recipe.deep_steps and recipe.most_loops <= teacher.config.total_ut_steps:
        raise TrainingError(
            f"most_loops must be above the model's total_ut_steps {teacher.config.total_ut_steps} where deep_steps is "
            f"above 0, got {recipe.most_loops}: raise it, or take both out of the recipe"
        )
    if given is None:
        return Pair(teacher, _from_teacher(teacher, recipe), teacher.dtype, teacher_folder)
    faults = _differences(teacher.config, given.config)
    if given.config.gate_kind != recipe.gate_kind:
        faults.append(f"gate_kind {given.config.gate_kind!r}, recipe {recipe.gate_kind!r}")
    if faults:
        raise TrainingError(
            f"student {student_folder} does not fit teacher {teacher_folder}: {'; '.join(faults)}. Give a student "
            "that was made from this teacher, or none to have one made"
        )
    return Pair(teacher, given.float(), teacher.dtype, teacher_folder)


def _load_alone(teacher_folder: Path | None, student_folder: Path | None) -> Pair:
    """A finished model, MELT or LoopLM, which is to be trained with its exit gate, or its exit gate alone."""
    if student_folder is None:
        raise TrainingError(
            "--student is missing: no phase of this recipe learns from a LoopLM, give the model that has the exit gate"
        )
    if teacher_folder is not None:
        raise TrainingError(
            f"--teacher must be left out where no phase learns from a LoopLM, got {teacher_folder}: give the model "
            "that has the exit gate as --student"
        )
    student = _load(student_folder)
    _require_exit_gate(student_folder, student.config)
    stored = student.dtype
    return Pair(None, student.float(), stored, student_folder)


def _load(folder: Path) -> MeltCausalLM:
    try:
        return load_checkpoint(folder)
    except CheckpointError as error:
        raise TrainingError(str(error)) from error


def _require_exit_gate(folder: Path, config: MeltConfig) -> None:
    if not config.exit_gate or config.total_ut_steps < 2:
        raise TrainingError(
            f"{folder} must have an exit gate and several loops, got exit_gate {config.exit_gate} and total_ut_steps "
            f"{config.total_ut_steps}: take [joint] and [exit] out of the recipe, or give a model with both"
        )


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
