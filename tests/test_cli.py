"""The command line: what it prints, where, and with which status."""

import io
import re
import sys

import pytest

from melt_runtime.cli import main
from melt_runtime.manifest import read_manifest
from melt_runtime.memory import plan_memory

QUESTION = "Ana reports to Ben. Ben reports to Cleo. Cleo reports to Dan. Who is two levels above Ana?"


def test_generate_prints_the_answer_and_its_costs(tiny_bundle, capsys):
    assert main(["generate", str(tiny_bundle), QUESTION, "--device", "cpu"]) == 0
    captured = capsys.readouterr()
    plan = plan_memory(read_manifest(tiny_bundle), 2048)
    assert captured.out.strip()
    assert "\n" not in captured.out.strip()
    assert re.search(r"memory: [\d.]+ MB of weights \+ [\d.]+ MB of state for 2048 tokens", captured.err)
    assert re.search(r"loops 4, prefill \d+ tokens at \d+/s, decode \d+ at \d+/s, state [\d.]+ MB", captured.err)
    assert f"{plan.state.total_bytes / 1e6:.2f} MB" in captured.err


def test_quiet_prints_the_answer_only(tiny_bundle, capsys):
    assert main(["generate", str(tiny_bundle), QUESTION, "--quiet", "--loops", "1"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert captured.out.strip()


def test_standard_input_is_a_prompt(tiny_bundle, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(QUESTION))
    assert main(["generate", str(tiny_bundle), "-", "--quiet"]) == 0
    piped = capsys.readouterr().out
    assert main(["generate", str(tiny_bundle), QUESTION, "--quiet"]) == 0
    assert piped == capsys.readouterr().out


def test_chat_keeps_the_conversation(tiny_bundle, capsys, monkeypatch):
    turns = f"{QUESTION}\n\nWho is one level above Ana?\n/reset\n{QUESTION}\n/quit\nnever read\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(turns))
    assert main(["chat", str(tiny_bundle), "--max-new-tokens", "8"]) == 0
    answers = capsys.readouterr().out.splitlines()
    assert len(answers) == 3
    assert answers[0] == answers[2]


def test_info_shows_model_parity_and_graphs(tiny_bundle, capsys):
    assert main(["info", str(tiny_bundle), "--graphs"]) == 0
    out = capsys.readouterr().out
    for part in ("trained with 4; gate elementwise, KV cache shared", "greedy tokens equal: 32 of 32", "latent_out.1"):
        assert part in out


def test_plan_is_exact_and_sets_melt_beside_a_cache_per_loop(tiny_bundle, capsys, tmp_path):
    picture = tmp_path / "plan.png"
    arguments = ["plan", str(tiny_bundle), "--capacity", "1000", "--batch", "2", "--loops", "8", "--plot", str(picture)]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    cache = 2 * 2 * 2 * 2 * 1000 * 32 * 4  # keys and values, layers, batch, Hk, S, dh, bytes
    (row,) = [line for line in out.splitlines() if line.startswith("KV cache")]
    assert f"{cache / 1e6:.2f} MB" in row
    assert f"{8 * cache / 1e6:.2f} MB" in row
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_doctor_says_what_can_run(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "device='cpu'      can run" in out
    assert re.search(r"device='cuda'     (can|cannot) run", out)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--loops", "0"], "loops must be at least 1, got 0"),
        (["--top-p", "1.4"], "top_p must be in (0, 1], got 1.4"),
        (["--max-new-tokens", "3000"], "the capacity is 2048"),
        (["--capacity", "0"], "capacity must be at least 1, got 0"),
    ],
)
def test_failures_print_one_line_and_status_one(tiny_bundle, capsys, options, message):
    assert main(["generate", str(tiny_bundle), QUESTION, "--quiet", *options]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert len(captured.err.splitlines()) == 1


def test_a_bad_bundle_is_one_error_and_debug_shows_its_traceback(tmp_path, capsys):
    assert main(["info", str(tmp_path)]) == 1
    assert "manifest.json does not exist" in capsys.readouterr().err
    with pytest.raises(Exception, match="manifest.json does not exist"):
        main(["info", str(tmp_path), "--debug"])


@pytest.mark.parametrize("arguments", [[], ["generate"], ["nonsense"], ["generate", "x", "y", "--loops", "many"]])
def test_wrong_usage_is_status_two(arguments, capsys):
    with pytest.raises(SystemExit) as exited:
        main(arguments)
    assert exited.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_help_teaches_with_examples(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    out = capsys.readouterr().out
    assert "examples:" in out
    assert "--loops 1" in out


def test_plot_without_matplotlib_names_the_extra(tiny_bundle, capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["plan", str(tiny_bundle), "--plot", str(tmp_path / "x.png")]) == 1
    assert "pip install 'melt-onnx[plot]'" in capsys.readouterr().err
