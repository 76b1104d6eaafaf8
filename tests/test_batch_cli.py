"""``melt batch``: its answers are those of one at a time, none twice and none lost, however a run ends."""

import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from conftest import MELT_TINY
from test_batch_files import FIELDS, batch, write
from test_bundle_faults import list_again

from melt_runtime import BatchError, BusyError, GenerationConfig, MeltModel
from melt_runtime.bundle.manifest import read_manifest
from melt_runtime.cli.batch_answers import Answers
from melt_runtime.cli.demo import BUNDLE as INT8
from melt_runtime.cli.main import main
from melt_runtime.memory.estimate import format_bytes
from melt_runtime.memory.plan import plan_state

posix = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
QUESTION = "Ana reports to Ben. Ben reports to Cleo. Who is two levels above Ana?"
CHATS = [json.loads(line)["messages"] for line in (MELT_TINY / "evaluation.jsonl").read_text().splitlines()]
NAMES = ("Ana", "Ben", "Cleo", "Dan", "Emil", "Faye", "Gina", "Hugo", "Iris", "Jana")
LONG = [f"{name} reports to Zoe. " * 280 + f"Who is one level above {name}?" for name in NAMES]
"""A quarter of a second each, and nothing in common that could be kept from one to the next."""


@pytest.fixture(scope="module")
def model(tiny_bundle) -> MeltModel:
    return MeltModel.load(tiny_bundle, device="cpu", threads=1)


@pytest.fixture
def prompts(tmp_path):
    return tmp_path / "prompts.jsonl"


@pytest.fixture
def out(tmp_path):
    return tmp_path / "answers.jsonl"


def read(path) -> dict:
    """Answers by id, each of which stands once."""
    text = path.read_text(encoding="utf-8")
    assert text.endswith("\n")
    answers = [json.loads(line) for line in text.splitlines()]
    assert all(list(answer) == FIELDS for answer in answers)
    found = {answer["id"]: answer for answer in answers}
    assert len(found) == len(answers)
    return found


def start(bundle, prompts, out, *options) -> subprocess.Popen:
    """The command in a process of its own, in which Ctrl-C counts."""
    line = ["batch", bundle, prompts, "--out", out, "--device", "cpu", "--threads", 1, *options]
    return subprocess.Popen(
        [sys.executable, "-m", "melt_runtime", *map(str, line)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_for_lines(process, path, count) -> None:
    """Waits until a file has so many lines more than it has now, and the process still works."""
    wanted = lines_of(path) + count
    while lines_of(path) < wanted:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.005)
    assert process.poll() is None, "it came to its end before it was stopped"


def lines_of(path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.parametrize("kind", ["float32", "int8"])
def test_each_answer_is_the_one_that_the_prompt_gets_alone(kind, tiny_bundle, prompts, out, capsys):
    bundle = tiny_bundle if kind == "float32" else INT8
    lines = [{"id": number, "messages": chat} for number, chat in enumerate(CHATS[:20])]
    lines += [{"id": str(loops), "prompt": QUESTION, "loops": loops} for loops in (1, 2, 3)]
    lines += [{"id": "Zoë 1", "prompt": QUESTION, "temperature": 2.0, "seed": 5, "stop_ids": [], "max_new_tokens": 30}]
    lines += [{"id": "stop", "prompt": QUESTION, "stop": ["."], "top_k": None}]
    write(prompts, *lines)
    assert batch(bundle, prompts, out, "--slots", 3, "--max-new-tokens", 12, "--seed", 1) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    state = plan_state(read_manifest(bundle), batch=3).total_bytes
    assert f"{format_bytes(state)} of state for 3 x 2048 tokens" in captured.err
    done = read(out)
    tokens = sum(answer["new_tokens"] for answer in done.values())
    shown = re.escape(format_bytes(state))
    summary = rf"25 of 25 prompts are answered, 25 of them now, {tokens} tokens in [\d.]+ m?s at \d+/s, state "
    assert re.search(rf"^{summary}{shown}, process peak [\d.]+ [MG]B$", captured.err, re.MULTILINE)
    assert "\r" not in captured.err
    alone = MeltModel.load(bundle, device="cpu", threads=1)
    assert len(done) == len(lines)
    for line in lines:
        settings = {name: value for name, value in line.items() if name not in ("id", "prompt", "messages")}
        config = GenerationConfig(max_new_tokens=12, seed=1).with_changes(**settings)
        expected = alone.generate(line.get("prompt", line.get("messages")), config)
        answer = done[line["id"]]
        assert answer.pop("seconds") > 0
        assert answer == {
            "id": line["id"],
            "text": expected.text,
            "finish_reason": expected.finish_reason,
            "loops": expected.loops,
            "prompt_tokens": expected.prompt_tokens,
            "new_tokens": len(expected.token_ids),
        }
    assert [answer["text"] for answer in (done["1"], done["stop"])] == ["Ben.", "Cleo"]


def test_quiet_says_nothing_and_raw_leaves_the_template_out(tiny_bundle, model, prompts, out, capsys):
    write(prompts, {"id": 1, "prompt": QUESTION}, {"id": 2, "messages": [{"role": "user", "content": QUESTION}]})
    assert batch(tiny_bundle, prompts, out, "--quiet", "--raw", "--max-new-tokens", 4) == 0
    assert capsys.readouterr() == ("", "")
    done = read(out)
    assert done[1]["prompt_tokens"] == model.generate(QUESTION, raw=True, max_new_tokens=1).prompt_tokens
    assert done[2]["prompt_tokens"] == model.generate(QUESTION, max_new_tokens=1).prompt_tokens
    assert batch("no bundle", prompts, out, "--quiet", "--raw") == 0
    assert capsys.readouterr() == ("", "")


def test_standard_input_is_a_file_of_prompts(tiny_bundle, out, capsys, monkeypatch):
    lines = b'{"id": "a", "prompt": "Zo\xc3\xab"}\r\n\n  \n{"id": "b", "prompt": "Ana"}'
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines), encoding="ascii"))
    assert batch(tiny_bundle, "-", out, "--quiet", "--max-new-tokens", 2) == 0
    assert read(out).keys() == {"a", "b"}
    monkeypatch.setattr("sys.stdin", None)
    assert batch(tiny_bundle, "-", out) == 1
    assert capsys.readouterr().err == "error: standard input is closed\n"


def test_what_is_answered_is_not_answered_again(tiny_bundle, prompts, out, capsys):
    lines = [{"id": number, "messages": chat} for number, chat in enumerate(CHATS[:12])]
    write(prompts, *lines[:5])
    assert batch(tiny_bundle, prompts, out) == 0
    first = out.read_bytes()
    write(prompts, *reversed(lines))
    capsys.readouterr()
    assert batch(tiny_bundle, prompts, out) == 0
    assert "12 of 12 prompts are answered, 7 of them now" in capsys.readouterr().err
    whole = out.read_bytes()
    assert whole.startswith(first)
    assert read(out).keys() == set(range(12))
    assert batch("no bundle", prompts, out) == 0
    assert capsys.readouterr().err == f"all 12 prompts are answered already in {out}\n"
    assert out.read_bytes() == whole
    assert sorted(path.name for path in out.parent.iterdir()) == ["answers.jsonl", "prompts.jsonl"]


def test_a_second_run_is_refused_as_long_as_the_first_writes(tiny_bundle, prompts, out, capsys):
    write(prompts, {"id": 1, "prompt": QUESTION})
    with Answers(out, [1]):
        assert batch("no bundle", prompts, out) == 1
        message = f"another run writes {out}: wait for it, end it, or name another --out"
        assert capsys.readouterr().err == f"error: {message}\n"
        with pytest.raises(BusyError):
            Answers(out, [1])
    assert not out.exists()
    assert batch(tiny_bundle, prompts, out) == 0
    assert read(out).keys() == {1}


@posix
def test_runs_that_are_killed_and_interrupted_go_on(tiny_bundle, model, prompts, out):
    lines = [{"id": number, "messages": chat} for number, chat in enumerate(CHATS[:4])]
    lines += [{"id": f"long {number}", "prompt": prompt, "max_new_tokens": 6} for number, prompt in enumerate(LONG)]
    write(prompts, *lines)
    with start(tiny_bundle, prompts, out, "--slots", 2) as process:
        wait_for_lines(process, out, 5)
        assert batch(tiny_bundle, prompts, out) == 1  # the first still writes
        process.kill()
        process.communicate()
    first = out.read_bytes()
    with start(tiny_bundle, prompts, out, "--slots", 2) as process:
        wait_for_lines(process, out, 1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate()
    assert process.returncode == 130
    assert errors.endswith(b"interrupted\n")
    assert b"Traceback" not in errors
    count = lines_of(out)
    assert f"{count} of {len(lines)} prompts are answered".encode() in errors
    assert 6 <= count < len(lines)
    with start(tiny_bundle, prompts, out, "--slots", 2, "--quiet") as process:
        assert process.communicate() == (b"", b"")
    assert process.returncode == 0
    assert out.read_bytes().startswith(first)
    done = read(out)
    assert done.keys() == {line["id"] for line in lines}
    for line in lines:
        expected = model.generate(line.get("prompt", line.get("messages")), max_new_tokens=line.get("max_new_tokens"))
        assert done[line["id"]]["text"] == expected.text


KILLED_WITHIN_A_LINE = """
import os, signal, sys
from melt_runtime.cli import batch_answers
from melt_runtime.cli.main import main

write = batch_answers.Answers._write

def write_or_die(self, data):
    if len(self.ids) == 3:
        write(self, data[: len(data) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, data)

batch_answers.Answers._write = write_or_die
main(sys.argv[1:])
"""


@posix
def test_a_run_that_is_killed_within_a_line_goes_on(tiny_bundle, prompts, out):
    write(prompts, *({"id": number, "messages": chat} for number, chat in enumerate(CHATS[:8])))
    arguments = ["batch", str(tiny_bundle), str(prompts), "--out", str(out), "--device", "cpu"]
    done = subprocess.run([sys.executable, "-c", KILLED_WITHIN_A_LINE, *arguments], capture_output=True)
    assert done.returncode == -signal.SIGKILL
    torn = out.read_bytes()
    assert torn.count(b"\n") == 3
    assert not torn.endswith(b"\n")
    assert main(arguments) == 0
    assert out.read_bytes().startswith(torn[: torn.rindex(b"\n") + 1])
    assert read(out).keys() == set(range(8))


@posix
@pytest.mark.parametrize(("count", "room"), [(8, 500), (1, 50)])
def test_a_full_disk_is_one_error_and_the_next_run_goes_on(count, room, tiny_bundle, prompts, out):
    """The system takes what there is room for, also of the last line."""
    import resource

    write(prompts, *({"id": number, "messages": chat} for number, chat in enumerate(CHATS[:count])))
    line = ["batch", tiny_bundle, prompts, "--out", out, "--device", "cpu", "--quiet"]
    command = [sys.executable, "-m", "melt_runtime", *map(str, line)]
    full = subprocess.run(
        command,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (room, room)),
    )
    assert (full.returncode, full.stderr) == (1, f"error: [Errno {errno.EFBIG}] {os.strerror(errno.EFBIG)}\n")
    assert out.stat().st_size == room
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert read(out).keys() == set(range(count))


def test_prompts_that_cannot_be_answered_are_named_and_tried_again(tiny_bundle, prompts, out, capsys):
    system = [{"role": "system", "content": "x"}, {"role": "user", "content": QUESTION}]
    lines = [
        {"id": "a", "prompt": QUESTION},
        b"",
        {"id": 'l"ö\x1b', "prompt": "Ana " * 500},
        {"id": 7, "messages": system},
        {"id": 8, "messages": [{"role": "\x1b[2J", "content": "x"}]},
        {"id": "b", "prompt": QUESTION, "max_new_tokens": 1},
    ]
    write(prompts, *lines)
    assert batch(tiny_bundle, prompts, out, "--capacity", 200) == 1
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    place = re.escape('line 3 (id "l\\"ö\\u001b")')
    assert re.match(rf"error: {place}: prompt and new tokens need \d+ rows, the capacity is 200", errors[0])
    assert errors[1].startswith("error: line 4 (id 7): the chat template refuses these messages: melt-tiny knows the")
    assert errors[2].endswith(r"knows the roles user and assistant, got \x1b[2J")
    assert errors[3] == "error: 3 of 5 prompts could not be answered; the same command tries them again"
    assert len(errors) == 4
    assert "2 of 5 prompts are answered, 2 of them now, " in captured.err
    assert read(out).keys() == {"a", "b"}
    before = out.read_bytes()
    assert batch(tiny_bundle, prompts, out, "--capacity", 200) == 1
    assert "2 of 5 prompts are answered, 0 of them now, state" in capsys.readouterr().err
    assert out.read_bytes() == before
    lines[3]["messages"] = system[1:]
    write(prompts, *lines[:4], lines[5])
    assert batch(tiny_bundle, prompts, out, "--capacity", 2048, "--max-new-tokens", 4) == 0
    assert out.read_bytes().startswith(before)
    assert read(out).keys() == {"a", "b", 7, 'l"ö\x1b'}


def test_of_many_prompts_that_cannot_be_answered_the_first_are_named(tiny_bundle, prompts, out, capsys):
    write(prompts, *({"id": f"n-{number}", "prompt": "Ana " * 50} for number in range(20)))
    assert batch(tiny_bundle, prompts, out, "--capacity", 20, "--quiet") == 1
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(": prompt")[0] for line in lines[:8]] == [
        f'error: line {number + 1} (id "n-{number}")' for number in range(8)
    ]
    assert lines[8:] == [
        "and 12 more",
        "error: 20 of 20 prompts could not be answered; the same command tries them again",
    ]
    assert not out.exists()


def test_a_model_that_computes_no_numbers(bundle_copy, prompts, out, capsys):
    weights = bundle_copy / "weights.data"
    weights.write_bytes(b"\xff" * weights.stat().st_size)
    list_again(bundle_copy, "weights.data")
    write(prompts, {"id": "a", "prompt": QUESTION}, {"id": "b", "prompt": QUESTION})
    assert batch(bundle_copy, prompts, out, "--quiet") == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith('error: line 1 (id "a"): the model gave logits of nan')
    assert len(lines) == 3
    assert not out.exists()


def test_a_loop_lm_gets_caches_for_its_deepest_prompt(random_bundle, prompts, out, capsys):
    bundle = random_bundle(gate_kind="none")
    lines = [{"id": 1, "prompt": "Ana"}, {"id": 2, "prompt": "Ana", "loops": 6}]
    write(prompts, *lines)
    assert batch(bundle, prompts, out, "--max-new-tokens", 2) == 0
    assert {id: answer["loops"] for id, answer in read(out).items()} == {1: 4, 2: 6}
    out.unlink()
    write(prompts, {"id": 1, "prompt": "Ana", "loops": 1})
    capsys.readouterr()
    assert batch(bundle, prompts, out, "--max-new-tokens", 2) == 0
    state = plan_state(read_manifest(bundle), loops=1).total_bytes
    assert f"{format_bytes(state)} of state for 256 tokens" in capsys.readouterr().err


@posix
def test_a_terminal_shows_how_far_it_is(tiny_bundle, prompts, out):
    from terminal import Terminal

    lines = [{"id": f"quick {number}", "messages": chat} for number, chat in enumerate(CHATS[:4])]
    lines += [{"id": f"long {number}", "prompt": prompt, "loops": 5} for number, prompt in enumerate(LONG)]
    write(prompts, *lines)
    options = ("--out", out, "--device", "cpu", "--slots", 1, "--max-new-tokens", 6)
    with Terminal("batch", tiny_bundle, prompts, *options) as terminal:
        terminal.wait_for(b"answers: ")
        terminal.wait_for(b"\rwarning: loops=5 is deeper")
        terminal.wait_for(b" tokens/s]")
        terminal.send(b"\x03")
        terminal.wait_for(b" prompts are answered, ")
        terminal.wait_for(b"interrupted")
        assert terminal.end() == 130
    assert b"/14 [" in terminal.output
    assert b"Traceback" not in terminal.output
    assert len(read(out)) >= 4


def test_progress_counts_prompts_that_cannot_be_answered_too(tiny_bundle):
    model = MeltModel.load(tiny_bundle, device="cpu", capacity=64, slots=2)
    told = []
    with pytest.raises(BatchError):
        model.generate_batch(["Ana", "x" * 500, "Ben", ""], progress=lambda *step: told.append(step), max_new_tokens=2)
    assert told == [(done, 4) for done in range(1, 5)]


def test_errors_keep_no_prompts(tiny_bundle):
    model = MeltModel.load(tiny_bundle, device="cpu", capacity=64, slots=2)
    with pytest.raises(BatchError) as raised:
        model.generate_batch(["Ana " * 100, [{"role": "system", "content": "x"}], [1, -1]])
    assert len(raised.value.errors) == 3
    for error in raised.value.errors.values():
        assert (error.__traceback__, error.__cause__, error.__context__) == (None, None, None)
