"""Long work shows itself: a bar on a terminal, lines in a log, nothing in a pipe; the scripts refuse odd arguments."""

import contextlib
import fcntl
import os
import pty
import struct
import sys
import termios
from pathlib import Path

import pytest
from conftest import MELT_TINY, random_model, save_checkpoint

from melt_models import progress
from melt_models.tiny import evaluate, teacher, write_data


def work() -> None:
    with progress.Progress("training", 3, "step", done=1) as shown:
        shown.advance(title="transition", note="loss 2")
        shown.advance(title="distillation", note="loss 1")


def all_of(master: int) -> str:
    """What a terminal got whose other end is closed; one read may return a part of it."""
    pieces = []
    with contextlib.suppress(OSError):  # how Linux says that nobody holds the other end any more
        while piece := os.read(master, 10_000):
            pieces.append(piece)
    os.close(master)
    return b"".join(pieces).decode()


def test_a_terminal_gets_a_bar(monkeypatch):
    reader, writer = pty.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    with os.fdopen(writer, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        work()
    written = all_of(reader)
    assert "\r" in written
    assert "distillation: 100%" in written
    assert "loss 1" in written


def test_a_log_gets_lines(monkeypatch, tmp_path):
    with (tmp_path / "log").open("w") as log:
        monkeypatch.setattr(sys, "stderr", log)
        monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
        work()
    lines = (tmp_path / "log").read_text()
    assert "\r" not in lines
    assert [line.rpartition(",")[0] for line in lines.splitlines()] == [
        "transition: 2 of 3 steps, loss 2",
        "distillation: 3 of 3 steps, loss 1",
        "distillation: 3 of 3 steps, loss 1",
    ]


def test_a_log_gets_no_line_for_every_step(monkeypatch, tmp_path):
    with (tmp_path / "log").open("w") as log:
        monkeypatch.setattr(sys, "stderr", log)
        work()
    assert len((tmp_path / "log").read_text().splitlines()) == 1


def test_a_pipe_gets_nothing(monkeypatch):
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stderr", pipe)
        monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
        work()
    assert os.read(reader, 100) == b""
    os.close(reader)


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        (teacher, ("--seed", "-1"), "--seed must be in [0, 2**63), got -1"),
        (teacher, ("--seed", str(2**63)), "--seed must be in"),
        (teacher, ("--most-steps", "0"), "--most-steps must be at least 1, got 0"),
        (write_data, ("--rows", "0"), "--rows must be at least 1, got 0"),
        (write_data, ("--rows", "-3"), "--rows must be at least 1, got -3"),
    ],
)
def test_odd_arguments_of_the_scripts_are_refused(tmp_path, capsys, script, arguments, message):
    assert script.main(["--out", str(tmp_path / "out"), *arguments]) == 1
    assert capsys.readouterr().err.startswith(f"error: {message}")
    assert not (tmp_path / "out").exists()


def test_outputs_that_are_there_are_refused(tmp_path, capsys):
    assert write_data.main(["--out", str(tmp_path), "--rows", "1"]) == 1
    assert f"{tmp_path} exists" in capsys.readouterr().err
    (tmp_path / "stage-1").mkdir()
    assert teacher.main(["--out", str(tmp_path), "--most-steps", "1"]) == 1
    assert "stage-1/stage.json is no record of a stage" in capsys.readouterr().err


def test_a_stage_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    stages = (teacher.Stage((1, 1), (0, 1), (2, 3), 1, teacher.NEVER, 1, questions=2),)
    trainer = teacher.Trainer(teacher.Recipe(batch=2), tmp_path, stages)

    def full(_: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trainer.tokenizer, "save_pretrained", full)
    monkeypatch.setattr(teacher, "exact_match", lambda *_, **__: {1: {1: 0.0}})
    with pytest.raises(OSError, match="No space left"):
        trainer.run()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [("--problems", "0"), ("--max-loops", "0"), ("--chunk", "-1")])
def test_odd_numbers_of_the_evaluation_are_refused(tmp_path, capsys, arguments):
    with pytest.raises(SystemExit) as end:
        evaluate.main([str(tmp_path), *arguments])
    assert end.value.code == 2
    assert f"{arguments[0]} must be at least 1, got {arguments[1]}" in capsys.readouterr().err


def test_the_evaluation_prints_a_table_for_each_way_to_read_a_prompt(monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "THRESHOLDS", (None, 0.9))
    assert evaluate.main([str(MELT_TINY), "--exit-gate", "--problems", "16"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("kind of answer: ") for line in lines) == 5
    rows = [line.split(" | ") for line in lines if line.startswith(("| every loop", "| 0.9"))]
    assert [len(row) for row in rows] == [12] * 10
    assert all(row[6:10] == ["4.00"] * 4 for row in rows if row[0] == "| every loop")


def test_a_model_without_an_exit_gate_has_no_such_table(tmp_path, capsys):
    folder = save_checkpoint(random_model(exit_gate=False), tmp_path / "gateless")
    assert evaluate.main([str(folder), "--exit-gate"]) == 1
    assert "has no exit gate: leave --exit-gate out" in capsys.readouterr().err


def test_a_folder_without_a_model_is_refused(tmp_path, capsys):
    assert evaluate.main([str(tmp_path)]) == 1
    assert "config.json" in capsys.readouterr().err
