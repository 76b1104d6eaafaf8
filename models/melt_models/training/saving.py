"""A run's folder: its settings, its log, its checkpoints, its model.

    OUT/run.json                 recipe, teacher and data: a resumed run must have the same
    OUT/log.jsonl                one line a step
    OUT/checkpoints/step-000050  student, optimizer and step; the newest one stays
    OUT/model                    the trained model, when the run is done

Everything appears whole or not at all: a checkpoint that cannot be written leaves the one before it, and a process that
is killed at any moment leaves nothing that the next one takes for whole.
Only one process trains in a folder at a time.
"""

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch

from melt_files import replace_text, staged
from melt_files.locks import lock
from melt_models.checkpoint import load_checkpoint
from melt_models.modeling import MeltCausalLM
from melt_models.training.errors import TrainingError
from melt_models.training.optimizer import Optimizer
from melt_models.training.processes import Processes

RUN_NAME, LOG_NAME, CHECKPOINTS_NAME, MODEL_NAME = "run.json", "log.jsonl", "checkpoints", "model"
_LOCK_NAME = ".lock"
_STATE_NAME = "optimizer.pt"
_STEP = re.compile(r"step-\d+")
_OLD = ".old"
"""Ending of a checkpoint that is being removed."""
_TEXTS = (
    *("tokenizer*", "chat_template*", "special_tokens_map.json", "vocab.json", "merges.txt", "added_tokens.json"),
    *("generation_config.json", "evaluation.jsonl", "LICENSE*"),
)


class RunFolder:
    """Reads and writes a run's folder; of several processes, only the first one writes. Used with ``with``."""

    def __init__(self, out: Path, settings: dict[str, Any], processes: Processes):
        """Makes the folder, or opens that of a run with the same settings.

        Raises:
            TrainingError: ``out`` is the folder of another run or of something else, or another process trains in it.
        """
        self.out, self._processes = out, processes
        if not processes.is_first:
            processes.wait()  # until the first one has made it
        path = out / RUN_NAME
        settings = json.loads(json.dumps(settings))  # as it will be read back
        if path.is_file():
            changes = _differences(_read_settings(path), settings)
            if changes:
                raise TrainingError(
                    f"{out} holds a run with other settings: {'; '.join(changes)}. Give it the same settings to go "
                    "on, or choose another --out"
                )
        elif out.exists() and not (out.is_dir() and all(map(_is_leftover, out.iterdir()))):
            raise TrainingError(f"{out} exists and is not a training run: choose another --out")
        if processes.is_first:
            out.mkdir(parents=True, exist_ok=True)
            self._lock = _locked(out)
            if not path.is_file():
                replace_text(path, json.dumps(settings, indent=2) + "\n")
            self._keep_newest()
            processes.wait()

    def __enter__(self) -> "RunFolder":
        """The folder itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Lets other processes train in it."""
        if self._processes.is_first:
            self._lock.close()

    @property
    def model(self) -> Path:
        """Where the trained model lies, once there is one."""
        return self.out / MODEL_NAME

    def newest(self) -> Path | None:
        """The newest checkpoint."""
        found = self._checkpoints()
        return found[-1] if found else None

    def _checkpoints(self) -> list[Path]:
        """Every checkpoint, the newest one last."""
        folders = (self.out / CHECKPOINTS_NAME).glob("step-*")
        return sorted((path for path in folders if _STEP.fullmatch(path.name)), key=_step_of)

    def save(self, step: int, student: MeltCausalLM, optimizer: Optimizer) -> None:
        """Writes the state after ``step`` steps, then removes older ones.

        Raises:
            TrainingError: it could not be written.
        """
        if not self._processes.is_first:
            return
        folder = self.out / CHECKPOINTS_NAME / f"step-{step:06d}"
        with self._writing(f"the checkpoint of step {step}"), staged(folder) as new:
            student.save_pretrained(new)
            torch.save({"step": step, "optimizer": optimizer.state_dict()}, new / _STATE_NAME)
        self._keep_newest()

    def _keep_newest(self) -> None:
        """Removes the other checkpoints; one that is half removed has no checkpoint's name."""
        for path in self._checkpoints()[:-1]:
            path.rename(path.with_name(f".{path.name}{_OLD}"))
        for path in (self.out / CHECKPOINTS_NAME).glob(f".step-*{_OLD}"):
            shutil.rmtree(path)

    def restore(self, student: MeltCausalLM, optimizer: Optimizer, device: torch.device) -> int:
        """Loads the newest checkpoint into both, cuts the log to it, and returns the number of steps done.

        Raises:
            TrainingError: the checkpoint is damaged.
        """
        folder, step = self.newest(), 0
        if folder is not None:
            path = folder
            try:
                student.load_state_dict(load_checkpoint(folder).state_dict())
                path = folder / _STATE_NAME
                state = torch.load(path, map_location=device, weights_only=True)
                optimizer.load_state_dict(state["optimizer"])
                step = int(state["step"])
            except Exception as error:  # torch raises what its readers do
                raise TrainingError(
                    f"{path} is damaged ({error!r}): put it back from a copy, or remove {folder} to begin anew"
                ) from error
        if self._processes.is_first and (self.out / LOG_NAME).is_file():
            kept = [record for record in read_log(self.out) if record["step"] <= step]
            with self._writing("the log"):
                replace_text(self.out / LOG_NAME, "".join(map(_line, kept)))
        self._processes.wait()
        return step

    def log(self, record: dict[str, Any]) -> None:
        """Adds one line to the log."""
        if not self._processes.is_first:
            return
        with self._writing("the log"), (self.out / LOG_NAME).open("a", encoding="utf-8") as file:
            file.write(_line(record))

    def finish(self, student: MeltCausalLM, source: Path) -> Path:
        """Writes the trained model, with the tokenizer and other texts of ``source`` beside it."""
        if self._processes.is_first and not self.model.exists():
            with self._writing("the trained model"), staged(self.model) as new:
                student.save_pretrained(new)
                for path in sorted(source.iterdir()):
                    if path.is_file() and any(path.match(pattern) for pattern in _TEXTS):
                        shutil.copyfile(path, new / path.name)
        self._processes.wait()
        return self.model

    @contextmanager
    def _writing(self, what: str) -> Iterator[None]:
        """Turns what goes wrong into an error that says what is kept."""
        older = self.newest()
        try:
            yield
        except Exception as error:  # OSError, torch's RuntimeError or safetensors' own, by what was being written
            raise TrainingError(
                f"{what} could not be written to {self.out}: {error}. The last good checkpoint is "
                f"{older or 'missing, there was none yet'}: free some space and run the same command again to go on"
            ) from error


def read_log(out: Path) -> list[dict[str, Any]]:
    """The records of a run, one a step; a last line that was not written to its end is none.

    Raises:
        TrainingError: ``out`` has no log, or one with lines that are no records.
    """
    path = out / LOG_NAME
    if not path.is_file():
        raise TrainingError(f"{path} does not exist: give the --out of a run that has taken a step")
    *lines, _ = path.read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise TrainingError(f"{path}, line {number} is not JSON: {error}; remove the line") from error
        if not isinstance(record, dict) or type(record.get("step")) is not int:
            raise TrainingError(f"{path}, line {number} is not the record of a step; remove the line")
        records.append(record)
    return records


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record) + "\n"


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise TrainingError(f"{path} is damaged, not JSON: {error}; choose another --out") from error
    if not isinstance(settings, dict):
        raise TrainingError(f"{path} is damaged, not the settings of a run; choose another --out")
    return settings


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def _is_leftover(path: Path) -> bool:
    """Whether it is of a process that was killed while it made the run's folder."""
    return path.name == _LOCK_NAME or path.name.startswith(f".{RUN_NAME}.")


def _locked(out: Path) -> IO[bytes]:
    """A file that, while it is open, keeps other processes from training in ``out``.

    Raises:
        TrainingError: another process trains there.
    """
    file = (out / _LOCK_NAME).open("ab")
    if lock(file.fileno(), wait=False) is False:
        file.close()
        raise TrainingError(f"another process trains in {out}: wait for it, end it, or choose another --out")
    return file


def _differences(old: Any, new: Any, name: str = "") -> list[str]:
    """Every value that differs, by its dotted name."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            change
            for key in dict.fromkeys((*old, *new))
            for change in _differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
        ]
    return [] if old == new else [f"{name} was {old!r}, now {new!r}"]
