"""The loop of a run: from a recipe, models and data to a trained checkpoint, resumable at any checkpoint."""

import math
import random
import re
import time
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from melt_models.modeling import MeltCausalLM
from melt_models.progress import Progress
from melt_models.training.allocator import keep_freed_memory
from melt_models.training.data import TokenData
from melt_models.training.errors import TrainingError
from melt_models.training.objective import Objective, Step
from melt_models.training.optimizer import Optimizer, exit_gate_of, make_optimizer
from melt_models.training.processes import Processes, joined
from melt_models.training.recipe import Exit, Joint, Phase, Recipe
from melt_models.training.saving import RunFolder
from melt_models.training.student import load_pair, values_of

_IN_CHUNKS = (0.0, 0.5)
"""Shares of a sequence that are read in chunks before a wave: all of it is written, or half of it is a prompt."""


def train(
    recipe: Recipe,
    teacher: Path | None,
    data: Path,
    out: Path,
    student: Path | None = None,
    device: str = "auto",
) -> Path:
    """Trains, or goes on where a run in ``out`` stopped; on the CPU both give the same weights bit for bit.

    Args:
        teacher: checkpoint of a LoopLM, frozen; None where the recipe has neither phase 1 nor 2.
        data: data set on disk, see ``melt_models.training.data``.
        out: the run's folder; made, or that of the same run.
        student: checkpoint to start from, MELT; without phases 1 and 2 a LoopLM, too. Default: the teacher with
            new gates.
        device: ``cpu``, ``cuda``, ``cuda:N``, or ``auto`` for CUDA where there is one.

    Returns:
        The folder of the trained model.

    Raises:
        TrainingError: bad input, a loss that is not finite, or a checkpoint that cannot be written.
    """
    with joined(choose_device(device)) as (processes, place):
        return _train(recipe, teacher, data, out, student, place, processes)


def _train(
    recipe: Recipe,
    teacher: Path | None,
    data: Path,
    out: Path,
    student: Path | None,
    place: torch.device,
    processes: Processes,
) -> Path:
    if recipe.batch_size % (recipe.micro_batch_size * processes.count):
        raise TrainingError(
            f"batch_size must be a multiple of micro_batch_size times processes ({recipe.micro_batch_size} * "
            f"{processes.count}), got {recipe.batch_size}: start another number of processes"
        )
    if place.type == "cpu":
        keep_freed_memory()
    pair = load_pair(teacher, student, recipe)
    tokens = TokenData(data, pair.student.config, max(recipe.chunk_sizes), recipe.seed, not processes.is_first)
    settings = {
        "recipe": asdict(recipe),
        "teacher": None if pair.teacher is None else _identity(pair.teacher),
        "student": None if student is None else _identity(pair.student),
        "data": {"rows": tokens.rows, "tokens": tokens.tokens},
    }
    with RunFolder(out, settings, processes) as folder:
        if folder.model.is_dir():
            return folder.model
        objective = Objective(
            pair.student.to(place).train(),
            pair.teacher
            and pair.teacher.to(place, torch.bfloat16 if recipe.precision == "bfloat16" else torch.float32),
            recipe.supervised_loops == "every",
            recipe.gradient_checkpointing,
            recipe.compile,
        )
        optimizer = make_optimizer(objective.student, recipe)
        done = folder.restore(objective.student, optimizer, place)
        _Loop(recipe, objective, optimizer, tokens, folder, place, processes).run(range(done, recipe.steps))
        # Below 1 it says that the gate was trained to leave by it, for these very weights.
        pair.student.config.early_exit_threshold = recipe.exit.threshold if recipe.exit else 1.0
        return folder.finish(pair.student.to("cpu", pair.stored), pair.folder)


def choose_device(device: str) -> torch.device:
    """The device to train on.

    Raises:
        TrainingError: not a device, or CUDA where torch sees none.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", device):
        raise TrainingError(f"device must be auto, cpu, cuda or cuda:N, got {device!r}")
    place = torch.device(device)
    if place.type == "cuda":
        if not torch.cuda.is_available():
            raise TrainingError(f"device {device} was asked for and torch {torch.__version__} sees no CUDA: use cpu")
        count = torch.cuda.device_count()
        if place.index is not None and place.index >= count:
            raise TrainingError(f"device {device} was asked for and there are {count}: the last is cuda:{count - 1}")
    return place


def draw_step(recipe: Recipe, step: int, loops: int) -> Step:
    """What is drawn at a step: it depends on nothing but recipe and step."""
    rng = random.Random(f"{recipe.seed}/{step}")
    chunk = rng.choice(recipe.chunk_sizes)
    depth, drawn = loops, rng.random()
    if drawn < recipe.shallow_steps:
        depth = rng.randrange(1, loops)
    elif drawn < recipe.shallow_steps + recipe.deep_steps:
        depth = rng.randrange(loops + 1, recipe.most_loops + 1)
    phase, alpha, leaving = recipe.phase_of(step), recipe.alpha_of(step), None
    if not isinstance(phase, Phase):
        depth = loops
    if alpha is None and not isinstance(phase, Joint) and rng.random() < recipe.leaving_steps:
        leaving = rng.getrandbits(32)
    lag, in_chunks = None, 0.0
    if (
        alpha is None
        and leaving is None
        and isinstance(phase, Phase)
        and depth > 1
        and rng.random() < recipe.wave_steps
    ):
        lag, in_chunks = rng.randrange(1, depth), rng.choice(_IN_CHUNKS)
    return Step(phase, depth, chunk, alpha, leaving, lag, in_chunks)


class _Loop:
    """The steps of one process."""

    def __init__(
        self,
        recipe: Recipe,
        objective: Objective,
        optimizer: Optimizer,
        data: TokenData,
        folder: RunFolder,
        device: torch.device,
        processes: Processes,
    ):
        self.recipe, self.student, self.optimizer = recipe, objective.student, optimizer
        self.data, self.folder, self.device, self.processes = data, folder, device, processes
        self._alone = objective
        self.objective: nn.Module = objective
        self._phase: Phase | Joint | Exit | None = None

    def _enter(self, phase: Phase | Joint | Exit) -> None:
        """Gradients for what a phase trains: the rest stays as it is, bit for bit."""
        if phase is self._phase:
            return
        self._phase = phase
        self.student.requires_grad_(phase.trains_model)
        for parameter in exit_gate_of(self.student):
            parameter.requires_grad_(phase.trains_exit_gate)
        if not isinstance(phase, Phase):
            self.optimizer.set_exit_rate(phase.learning_rate)
        self.objective = self.processes.wrap(self._alone)

    def run(self, steps: range) -> None:
        """Takes ``steps``, with progress, log and checkpoints."""
        recipe, tokens, started = self.recipe, 0, time.perf_counter()
        with Progress("training", recipe.steps, "step", steps.start, is_silent=not self.processes.is_first) as progress:
            for step in steps:
                record = self.step(step, draw_step(recipe, step, self.student.config.total_ut_steps))
                tokens += record["tokens"]
                seconds = time.perf_counter() - started
                self.folder.log({**record, "seconds": round(seconds, 3)})
                if (step + 1) % recipe.checkpoint_every == 0 or step + 1 == recipe.steps:
                    self.folder.save(step + 1, self.student, self.optimizer)
                note = f"loss {record['loss']:.4f}, {tokens / seconds:.0f} tokens/s"
                progress.advance(title=record["phase"], note=note)

    def step(self, step: int, drawn: Step) -> dict[str, Any]:
        """One optimizer step; returns its line of the log.

        Raises:
            TrainingError: the loss is not finite, or the device's memory is full.
        """
        recipe = self.recipe
        self._enter(drawn.phase)
        try:
            terms, tokens = self.accumulate(step, drawn)
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise TrainingError(
                f"step {step + 1} needs more memory than {self.device} has: lower micro_batch_size, or set "
                "gradient_checkpointing"
            ) from error
        if not math.isfinite(terms["loss"]):
            raise TrainingError(
                f"the loss of step {step + 1} is {terms['loss']}: lower the learning rates or gradient_clip; "
                f"the last good checkpoint is {self.folder.newest() or 'missing: there was none yet'}"
            )
        norm = nn.utils.clip_grad_norm_(self.student.parameters(), recipe.gradient_clip).item()
        rate = recipe.rate_of(step)
        self.optimizer.step(rate)
        name = recipe.name_of(step)
        record = {"step": step + 1, "phase": name, **terms, "gradient_norm": norm, "rate": rate, "alpha": drawn.alpha}
        read = {"chunk": drawn.chunk_size, "lag": drawn.lag, "in_chunks": drawn.in_chunks if drawn.lag else 1.0}
        return record | {"loops": drawn.loops, **read, "tokens": tokens}

    def accumulate(self, step: int, drawn: Step) -> tuple[dict[str, float], int]:
        """Adds up one step's gradients; returns mean terms and the tokens of all processes."""
        recipe, count = self.recipe, self.processes.count
        parts = recipe.batch_size // (recipe.micro_batch_size * count)
        sums: dict[str, float] = {}
        for part in range(parts):
            place = (part * count + self.processes.rank) * recipe.micro_batch_size
            batch = self.data.batch(step * recipe.batch_size + place, recipe.micro_batch_size).to(self.device)
            mixed = torch.autocast(self.device.type, torch.bfloat16, enabled=recipe.precision == "bfloat16")
            is_last = part == parts - 1
            waiting = nullcontext() if count == 1 or is_last else self.objective.no_sync()
            with waiting:
                with mixed:
                    got = self.objective(batch, drawn)
                (got["loss"] / parts).backward()
            values = {name: value.item() for name, value in got.items()} | {"tokens": batch.real.sum().item()}
            sums = {name: sums.get(name, 0.0) + value for name, value in values.items()}
        means = self.processes.mean(sums)
        tokens = round(means.pop("tokens") * count)
        return {name: value / parts for name, value in means.items()}, tokens


def _identity(model: MeltCausalLM) -> dict[str, Any]:
    """What tells one model from another without its path: its shape and a sum of its weights."""
    total = sum(parameter.double().abs().sum().item() for parameter in model.parameters())
    return {"config": values_of(model.config), "sum_of_magnitudes": total}
