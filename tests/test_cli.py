"""The command line: what it prints, where, and with which status."""

import argparse
import errno
import io
import json
import os
import re
import shlex
import socket
import subprocess
import sys
from dataclasses import asdict, fields
from types import SimpleNamespace

import pytest

from melt_runtime import GenerationConfig, MeltModel, __version__
from melt_runtime.bundle.manifest import read_manifest
from melt_runtime.cli import depth
from melt_runtime.cli.answer import add_generate_options
from melt_runtime.cli.main import main
from melt_runtime.loading.load_cache import LoadCache
from melt_runtime.memory.estimate import plan_memory
from melt_runtime.serve.forms import CompletionRequest

QUESTION = "Ana reports to Ben. Ben reports to Cleo. Cleo reports to Dan. Who is two levels above Ana?"


def test_generate_prints_the_answer_and_its_costs(tiny_bundle, capsys):
    assert main(["generate", str(tiny_bundle), QUESTION, "--device", "cpu"]) == 0
    captured = capsys.readouterr()
    plan = plan_memory(read_manifest(tiny_bundle), 2048)
    assert captured.out.strip()
    assert "\n" not in captured.out.strip()
    assert re.search(r"memory: [\d.]+ MB of weights \+ [\d.]+ MB of state for 2048 tokens", captured.err)
    costs = r"prompt \d+ tokens in [\d.]+ m?s, answer \d+ at \d+/s, loops 4, finish: stop, state [\d.]+ MB"
    assert re.search(costs, captured.err)
    assert f"{plan.state.total_bytes / 1e6:.2f} MB" in captured.err


def test_quiet_prints_the_answer_only(tiny_bundle, capsys):
    assert main(["generate", str(tiny_bundle), QUESTION, "--quiet", "--loops", "1"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert captured.out.strip()


def test_standard_input_is_a_prompt(tiny_bundle, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{QUESTION}\n"))  # as a shell gives it
    assert main(["generate", str(tiny_bundle), "-", "--quiet"]) == 0
    piped = capsys.readouterr().out
    assert main(["generate", str(tiny_bundle), QUESTION, "--quiet"]) == 0
    assert piped == capsys.readouterr().out


def test_a_raw_prompt_is_given_as_it_is(tiny_bundle, capsys, monkeypatch):
    counts = []
    for text in (QUESTION, f"{QUESTION}\n"):
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        assert main(["generate", str(tiny_bundle), "-", "--raw", "--max-new-tokens", "1"]) == 0
        counts.append(int(re.search(r"prompt (\d+) tokens", capsys.readouterr().err)[1]))
    assert counts[1] > counts[0]


def test_info_shows_model_parity_and_graphs(tiny_bundle, capsys):
    assert main(["info", str(tiny_bundle), "--graphs"]) == 0
    out = capsys.readouterr().out
    for part in ("trained with 4; gate elementwise, KV cache shared", "first choice equal: ", "latent_out.1"):
        assert part in out
    assert "waves (float KV cache), first choice as in plain decoding: lag 1 " in out


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
        (["--chunk", "0"], "chunk must be at least 1, got 0"),
        (["--threads", "0"], "threads must be at least 1, got 0"),
        (["--stop", ""], "stop must be a sequence of non-empty strings"),
        (["--stop", "x\udcff"], "--stop must be UTF-8 text, got the byte 0xff after 1 bytes"),
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
    captured = capsys.readouterr()
    assert "pip install 'melt-onnx[plot]'" in captured.err
    assert captured.out == ""


def melt(*arguments, **options) -> subprocess.CompletedProcess:
    """The command in a process of its own."""
    command = [sys.executable, "-m", "melt_runtime", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, **options)


def test_the_version_is_one(capsys):
    with pytest.raises(SystemExit) as exited:
        main(["--version"])
    assert exited.value.code == 0
    assert capsys.readouterr().out == f"melt {__version__}\n"


@pytest.mark.parametrize("device", ["cpu", "auto"])
def test_a_quiet_run_on_the_cpu_says_nothing_but_its_answer(device, tiny_bundle):
    """No line of ONNX Runtime about CUDA either, whichever build of it is installed."""
    done = melt("generate", tiny_bundle, QUESTION, "--quiet", "--device", device, "--threads", 1)
    assert done.stderr == b""
    assert done.stdout.decode().split() == ["Cleo."]


@pytest.mark.parametrize("prompt", ["", "  \n"])
def test_an_empty_prompt_is_refused_before_anything_is_loaded(prompt, tmp_path, capsys, monkeypatch):
    assert main(["generate", str(tmp_path / "none"), prompt]) == 1
    assert "the prompt is empty: give at least one character" in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin", io.StringIO(prompt))
    assert main(["generate", str(tmp_path / "none"), "-"]) == 1
    assert "standard input is empty: it must hold the prompt" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("prompt", "fault"),
    [
        ("ab\udcffc", "got the byte 0xff after 2 bytes"),
        ("é\udcc3", "got the byte 0xc3 after 2 bytes"),
        ("\ud800", "got half a character after 0 characters"),
    ],
)
def test_text_that_is_not_utf8_is_one_error(prompt, fault, tmp_path, capsys, monkeypatch):
    assert main(["generate", str(tmp_path / "none"), prompt]) == 1
    assert capsys.readouterr().err == f"error: the prompt must be UTF-8 text, {fault}\n"
    assert main(["demo", prompt]) == 1
    assert capsys.readouterr().err == f"error: the question must be UTF-8 text, {fault}\n"
    assert main(["chat", str(tmp_path / "none"), "--system", prompt]) == 1
    assert capsys.readouterr().err == f"error: --system must be UTF-8 text, {fault}\n"


def test_bytes_of_standard_input_that_are_no_text_are_one_error(tmp_path):
    done = melt("generate", tmp_path / "none", "-", input=b"ab\xffc")
    assert done.returncode == 1
    assert done.stderr == b"error: standard input must be UTF-8 text, got the byte 0xff after 2 bytes\n"


def test_a_terminal_of_few_characters_shows_the_others_by_number(tiny_bundle, capsys):
    """A name beyond ASCII comes in as UTF-8 whatever the locale, and goes out as it can."""
    assert main(["generate", str(tiny_bundle), "Zoë", "--quiet", "--max-new-tokens", "4"]) == 0
    expected = capsys.readouterr().out
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    for arguments, given in ((["Zoë"], b""), (["-"], "Zoë".encode())):
        options = ("--quiet", "--max-new-tokens", 4)
        done = melt("generate", tiny_bundle, *arguments, *options, input=given, env=environment)
        assert (done.returncode, done.stderr) == (0, b"")
        assert done.stdout.decode() == expected.encode("ascii", "backslashreplace").decode()
    done = melt("info", tiny_bundle.parent / "Zoë", env=environment)
    assert done.returncode == 1
    assert b"Zo\\xeb" in done.stderr


posix = pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX shell")


@posix
@pytest.mark.parametrize("command", ["info {bundle} --graphs", "--help", "generate {bundle} 'Who?'", "cache"])
def test_a_reader_that_leaves_ends_the_command_quietly(command, tiny_bundle):
    arguments = shlex.split(command.format(bundle=tiny_bundle))
    line = [sys.executable, "-m", "melt_runtime", *arguments]
    # argparse itself passes over what it cannot write at once.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        process.stdout.close()
        errors = process.stderr.read()
    assert process.returncode == 141
    for word in (b"Traceback", b"roken pipe", b"Exception", b"error"):
        assert word not in errors


@posix
@pytest.mark.parametrize(
    ("redirection", "message"),
    [
        (">&-", "error: standard output is closed"),
        (">/dev/full", f"error: [Errno {errno.ENOSPC}] {os.strerror(errno.ENOSPC)}"),
        ("2>&-", ""),
    ],
)
def test_streams_that_are_closed_or_full(redirection, message, tiny_bundle):
    if "full" in redirection and not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    line = f"{sys.executable} -m melt_runtime plan {tiny_bundle} {redirection}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
    assert done.stderr.strip() == message
    assert done.returncode == (1 if message else 0)
    assert bool(done.stdout) == (not message)


@posix
@pytest.mark.parametrize("command", ["generate", "chat"])
def test_a_closed_standard_input(command, tiny_bundle):
    arguments = ["-"] if command == "generate" else []
    line = f"{sys.executable} -m melt_runtime {command} {tiny_bundle} {' '.join(arguments)} <&-"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "error: standard input is closed\n")


def test_an_interrupted_command_has_status_130(capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("melt_runtime.cli.main.diagnose", interrupt)
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err == "interrupted\n"
    monkeypatch.setattr("melt_runtime.cli.main._parser", interrupt)
    assert main(["doctor"]) == 130


@pytest.mark.parametrize("command", ["plan", "bench"])
@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("none/x.png", "the folder of {folder}/none/x.png does not exist"),
        ("x.xyz", "a picture's file must end in one of ."),
        ("x", "a picture's file must end in one of ."),
        ("folder.png", "{folder}/folder.png is a folder: name a file"),
    ],
)
def test_a_picture_that_cannot_be_written_is_refused_before_the_work(command, path, message, tmp_path, capsys):
    (tmp_path / "folder.png").mkdir()
    assert main([command, str(tmp_path / "no bundle"), "--plot", str(tmp_path / path)]) == 1
    captured = capsys.readouterr()
    assert message.format(folder=tmp_path) in captured.err
    assert captured.out == ""
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder.png"]


@pytest.mark.parametrize("kind", ["float", "int8", "int4"])
def test_plan_names_kv_caches_as_the_option_does(kind, tiny_bundle, tmp_path, capsys):
    picture = tmp_path / "plan.svg"
    assert main(["plan", str(tiny_bundle), "--kv-cache", kind, "--loops", "600", "--plot", str(picture)]) == 0
    name = "float32" if kind == "float" else kind
    assert f"KV cache {name}\n" in capsys.readouterr().out
    assert picture.stat().st_size < 200_000  # not a mark and a number for each of a thousand depths


def allocate(bundle, batch=1, **sizes) -> None:
    MeltModel.load(bundle, device="cpu", **sizes).new_runner(batch)


@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        (["--capacity", "4097"], {"capacity": 4097}),
        (["--capacity", "0"], {"capacity": 0}),
        (["--loops", "1025"], {"loops": 1025}),
        (["--batch", "4097"], {"batch": 4097}),
        (["--batch", "0"], {"batch": 0}),
        (["--chunk", "3000"], {"chunk": 3000}),
    ],
)
def test_plan_plans_only_what_can_be_allocated(options, arguments, tiny_bundle, capsys):
    assert main(["plan", str(tiny_bundle), *options]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    with pytest.raises(ValueError, match=options[0][2:]) as raised:
        allocate(tiny_bundle, **arguments)
    assert captured.err == f"error: {raised.value}\n"


def test_plan_refuses_a_kv_cache_that_the_bundle_has_not(bundle_copy, capsys):
    manifest = json.loads((bundle_copy / "manifest.json").read_text())
    for place in (manifest["graphs"], manifest["files"], manifest["quality"]["kv_cache"]):
        for name in [name for name in place if "int4" in name]:
            del place[name]
    (bundle_copy / "manifest.json").write_text(json.dumps(manifest))
    assert main(["plan", str(bundle_copy), "--kv-cache", "int4"]) == 1
    assert "kv_cache must be one of float, int8, which this float32 bundle has, got 'int4'" in capsys.readouterr().err


def test_info_of_what_was_not_measured(random_bundle, capsys):
    assert main(["info", str(random_bundle("int4"))]) == 0
    out = capsys.readouterr().out
    assert "parity      not compared with torch" in out
    assert "quality     not measured" in out


def test_info_wraps_long_values_and_obeys_none(bundle_copy, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    manifest = json.loads((bundle_copy / "manifest.json").read_text())
    manifest["producer"] = {f"package-{number}": "1.2.3" for number in range(30)}
    manifest["producer"]["\x1b[31mred\nline"] = "x" * 100
    (bundle_copy / "manifest.json").write_text(json.dumps(manifest))
    assert main(["info", str(bundle_copy)]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert r"\x1b[31mred\nline" in out
    for number in range(30):
        assert f"package-{number} 1.2.3" in " ".join(out.split())
    long = [line for line in out.splitlines() if len(line) > 80]
    assert all(len(line.split()) <= 2 for line in long)  # a single word or a path, which stays whole
    assert [line for line in long if "x" * 100 in line]


def test_the_cache_is_listed_and_cleared(tiny_bundle, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MELT_CACHE_DIR", str(tmp_path / "cache"))
    cache = LoadCache(min_bytes=1)
    MeltModel.load(tiny_bundle, device="cpu", cache=cache)
    (tmp_path / "cache" / "foreign.txt").write_text("mine")
    assert main(["cache"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{tmp_path / 'cache'}: ")
    assert sorted(line.split()[-1] for line in lines[1:]) == sorted(
        str((tiny_bundle / name).resolve()) for name in ("head.onnx", "loop.onnx")
    )
    assert main(["cache", "--clear"]) == 0
    out = capsys.readouterr().out
    assert "freed " in out
    assert f"left alone, not ours or in use: {tmp_path / 'cache' / 'foreign.txt'}" in out
    assert (tmp_path / "cache" / "foreign.txt").read_text() == "mine"
    assert main(["cache"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1
    monkeypatch.setenv("MELT_CACHE_GB", "inf")
    assert main(["cache"]) == 1
    assert "MELT_CACHE_GB must be a number of gigabytes" in capsys.readouterr().err


def test_a_warning_is_one_line(tiny_bundle, capsys):
    assert main(["generate", str(tiny_bundle), QUESTION, "--quiet", "--loops", "6"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("warning: loops=6 is deeper than the 4 loops")


@posix
def test_waits_show_themselves_on_a_terminal_and_end_when_interrupted(random_bundle):
    from terminal import Terminal

    prompt = "Ana reports to Ben. " * 40
    options = ("--loops", "1024", "--device", "cpu")
    with Terminal("generate", random_bundle(), prompt, *options) as terminal:
        for wait in (b"checking files: ", b"opening loop.onnx ...", b"prompt: "):
            terminal.wait_for(wait)
        terminal.send(b"\x03")
        terminal.wait_for(b"interrupted")
        assert terminal.end() == 130
    assert b"Traceback" not in terminal.output


@posix
def test_a_benchmark_shows_its_cases_on_a_terminal_and_ends_when_interrupted(tiny_bundle):
    from terminal import Terminal

    with Terminal("bench", tiny_bundle, "--loops", "1000", "--positions", "100", "--chunks", "64") as terminal:
        terminal.wait_for(b"reading memory ...")
        terminal.wait_for(b", first token: ")
        terminal.send(b"\x03")
        terminal.wait_for(b"interrupted")
        assert terminal.end() == 130
    assert b"Traceback" not in terminal.output


def test_nothing_of_it_reaches_a_pipe(random_bundle):
    done = melt("generate", random_bundle(), "Ana reports to Ben. " * 30, "--loops", 64, "--max-new-tokens", 1)
    assert done.returncode == 0
    assert b"\r" not in done.stderr
    assert [line.split()[0] for line in done.stderr.decode().splitlines()] == [
        "memory:",
        "device:",
        "warning:",
        "prompt",
    ]


def luminance(colour: int) -> float:
    """Relative luminance (WCAG 2.2) of one of the 256 colours of terminals."""
    steps = (0, 95, 135, 175, 215, 255)
    cube = colour - 16
    rgb = (8 + 10 * (colour - 232),) * 3 if colour >= 232 else tuple(steps[cube // size % 6] for size in (36, 6, 1))
    red, green, blue = (
        value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in (one / 255 for one in rgb)
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("colour", depth.COLOURS)
def test_colours_can_be_read_on_black_and_on_white(colour):
    assert 1.05 / (luminance(colour) + 0.05) >= 3
    assert (luminance(colour) + 0.05) / 0.05 >= 3


@pytest.mark.parametrize(
    ("is_terminal", "variable", "has_colours"),
    [(True, None, True), (True, "", True), (True, "1", False), (False, None, False)],
)
def test_colours_are_for_terminals_without_no_color(is_terminal, variable, has_colours, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    if variable is not None:
        monkeypatch.setenv("NO_COLOR", variable)
    painted = depth.colours(SimpleNamespace(isatty=lambda: is_terminal))("Ben", 2)
    assert painted == ("\x1b[38;5;33mBen\x1b[0m" if has_colours else "Ben")


def test_a_pipe_gets_no_escapes(random_bundle):
    done = melt("generate", random_bundle(), "Ana", "--show-depth", "--max-new-tokens", 3)
    assert done.returncode == 0
    assert b"\x1b" not in done.stdout + done.stderr
    assert b"depth: " in done.stderr


def test_a_port_that_is_taken_is_found_before_the_model_is_loaded(capsys):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        assert main(["serve", "no-such-bundle", "--port", port]) == 1
    assert f"error: cannot listen on 127.0.0.1, port {port}: " in capsys.readouterr().err


def test_a_model_of_one_loop_runs_no_more(random_bundle, capsys):
    bundle = random_bundle(gate_kind="none", total_ut_steps=1)
    message = "loops must be 1, got 4: this model has one loop"
    for command in (["generate", str(bundle), "Ana", "--loops", "4"], ["plan", str(bundle), "--loops", "4"]):
        assert main(command) == 1
        assert f"error: {message}" in capsys.readouterr().err
    with pytest.raises(ValueError, match=message):
        MeltModel.load(bundle, device="cpu", capacity=64, loops=4)
    model = MeltModel.load(bundle, device="cpu", capacity=64)
    for options in ({"loops": 4}, {"loops": "auto", "exit_rule": "settled", "max_loops": 4}):
        with pytest.raises(ValueError, match=message):
            model.generate([5, 6], **options)
    with pytest.raises(ValueError, match=message):
        model.new_runner().decode([5], 4)
    assert len(model.generate([5, 6], max_new_tokens=2, stop_ids=()).token_ids) == 2


def test_the_sampler_has_the_same_options_everywhere():
    """In Python, over HTTP and on the command line; names of HTTP are OpenAI's."""
    of_python = {field.name for field in fields(GenerationConfig)} - {"logits_processors"}
    of_http = {"max_tokens": "max_new_tokens", "stop_token_ids": "stop_ids"}
    http = {of_http.get(name, name) for name in CompletionRequest.model_fields} & of_python
    assert of_python - http == {"json_schema", "regex", "lark"}  # there one field, grammar
    parser = argparse.ArgumentParser()
    add_generate_options(parser)
    assert of_python - {action.dest for action in parser._actions} == {"stop_ids"}


@pytest.mark.parametrize(
    ("options", "changes"),
    [
        (
            ["--presence-penalty", "1.5", "--frequency-penalty", "-1"],
            {"presence_penalty": 1.5, "frequency_penalty": -1.0},
        ),
        (["--logit-bias", "7=-100", "--logit-bias", "9=2.5"], {"logit_bias": {7: -100.0, 9: 2.5}}),
        (["--logprobs", "2"], {"logprobs": 2}),
    ],
)
def test_an_answer_is_printed_for_programs(options, changes, tiny_bundle, capsys):
    command = ["generate", str(tiny_bundle), QUESTION, "--json", "--quiet", "--device", "cpu", "--max-new-tokens", "12"]
    assert main([*command, *options]) == 0
    said = json.loads(capsys.readouterr().out)
    expected = MeltModel.load(tiny_bundle, device="cpu").generate(QUESTION, max_new_tokens=12, **changes)
    assert said.keys() == asdict(expected).keys()
    for name in ("text", "token_ids", "finish_reason", "loops_per_token", "logprobs", "prompt_tokens"):
        assert said[name] == json.loads(json.dumps(asdict(expected)[name])), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--logprobs", "2"], "--logprobs must go with --json"),
        (["--json", "--show-depth"], "--show-depth must be left out with --json"),
        (["--presence-penalty", "3"], r"presence_penalty must be in [-2, 2], got 3.0"),
        (["--logit-bias", "x=1"], "logit_bias's token id must be a whole number, got 'x'"),
    ],
)
def test_options_that_do_not_go_together_are_named(options, message, capsys):
    assert main(["generate", "no-bundle", QUESTION, *options]) == 1
    assert f"error: {message}" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["7", "7=x", "=", ""])
def test_a_bias_is_a_token_id_and_a_number(value, capsys):
    with pytest.raises(SystemExit):
        main(["generate", "no-bundle", QUESTION, "--logit-bias", value])
    assert "must be a token id, = and a number, as in 7=-100" in capsys.readouterr().err


def test_what_commands_find_is_printed_for_programs(tiny_bundle, capsys):
    assert main(["plan", str(tiny_bundle), "--capacity", "100", "--json"]) == 0
    plan, told = plan_memory(read_manifest(tiny_bundle), 100), json.loads(capsys.readouterr().out)
    assert (told["state_bytes"], told["total_bytes"]) == (plan.state.total_bytes, plan.total_bytes)
    assert (told["capacity"], told["kv_cache"]) == (100, "float32")
    assert main(["info", str(tiny_bundle), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["manifest"] == json.loads(json.dumps(asdict(read_manifest(tiny_bundle))))
    assert told["defaults"]["stop_ids"]
    assert main(["doctor", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["telemetry"] == "off"
    assert told["packages"]["melt-onnx"] == __version__
    assert "CPUExecutionProvider" in told["providers"]
    assert main(["info", str(tiny_bundle / "nowhere"), "--json"]) == 1
    captured = capsys.readouterr()
    assert (captured.out, captured.err.partition(" ")[0]) == ("", "error:")
