"""Every example of the documents and of the commands' help runs as it stands, on small models under the names they use.

What cannot run here stands in a table, each with its reason, and is checked as far as possible: options by the
command's own parser, targets of make, files, extras of pip, names in Python.
"""

import argparse
import importlib
import io
import json
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import MELT_TINY, ROOT
from documents import COMMANDS, DOCUMENTS, SUBCOMMANDS, Example, python_examples, shell_examples
from published import write_ouro
from transformers import AutoTokenizer

from melt_export.cli import _parser as export_parser
from melt_models.tiny.task import make_problem
from melt_models.training.recipe import read_recipe
from melt_models.training.recipe_files import recipe_path

_INSTALLS = "changes the environment (tests/test_packaging.py)"
_FULL_SIZE = "models of full size: gigabytes, and minutes to hours (make bench, make test-large)"
_TRAINS = "trains for hours (tests/test_training_run.py takes the same steps)"
_MINUTES = "takes minutes"
_GPU = "needs a GPU (make test-cuda)"
_MAKE = "a target of make: minutes, in an environment of its own"
_PEERS = "installs other runtimes in environments of their own, and measures for an hour"
_GENAI = "needs an environment of its own (tests/test_genai.py)"
_OPTIMUM = "needs an environment of its own (tests/test_optimum.py)"
_WEB = "needs Node and a browser (tests/test_web.py)"
_CPP = "needs a compiler and ONNX Runtime's headers (tests/test_examples.py)"

_RAY = "needs an environment of its own, with Ray (make test-ray)"

_SERVES = "serves until it is told to end (tests/test_serve_limits.py)"

NOT_RUN = {
    "pip install '.[cpu,serve]'": _INSTALLS,
    "melt serve build/melt-tiny": _SERVES,
    "melt serve build/melt-tiny --host 0.0.0.0 --api-key-file key.txt --slots 16 --kv-cache int8": _SERVES,
    "pip install '.[cpu]'": _INSTALLS,
    "pip install '.[cpu,export]' --extra-index-url https://download.pytorch.org/whl/cpu": _INSTALLS,
    "pip install 'melt-onnx[gguf]'": _INSTALLS,
    "pip install '.[cuda]' '.[cuda-libraries]'": _INSTALLS,
    "pip install '.[train,export,cuda]'": _INSTALLS,
    "pip install onnxruntime-genai tokenizers": _GENAI,
    "pip install . ./integrations/optimum": _OPTIMUM,
    "pip install '.[cpu,serve]' ./integrations/ray": _RAY,
    "serve run integrations/ray/serve.yaml": _RAY,
    "melt-ray batch prompts.jsonl --bundle build/melt-tiny --out answers": _RAY,
    "build/environments/ray/bin/python integrations/ray/benchmarks/passing_on.py build/melt-tiny": _RAY,
    "build/environments/ray/bin/python integrations/ray/benchmarks/replica_memory.py "
    "build/bench/melt-1.6b-4-int8": _RAY,
    "build/environments/ray/bin/python integrations/ray/benchmarks/cache_hits.py build/melt-tiny "
    "--conversations 16": _RAY,
    "python benchmarks/session_moves.py build/bench/melt-1.6b-4-int8 build/bench/ouro-1.4b-4-int8 --loops 1,4 "
    "--kv-cache float --threads 1 --json docs/data/session-moves.json": _FULL_SIZE,
    "make demo": _MAKE,
    "make test": _MAKE,
    "make train-smoke": _MAKE,
    "make melt-tiny": _MAKE,
    "make melt-code": _MAKE,
    "python benchmarks/settling.py models/melt-code --data build/melt-code-training/data/held_out": _MINUTES,
    "python benchmarks/training_code.py --teacher build/melt-code-training/teacher/model --data "
    "build/melt-code-training/data --out build/code-tables --jobs 2 --json docs/data/training-code.json": _TRAINS,
    "make melt-code-teacher": _MAKE,
    "python -m melt_models.code.evaluate models/melt-code --data build/melt-code-training/data/held_out": _MINUTES,
    "python export.py models/melt-code --out build/melt-code-int8 --precision int8 --eval-text "
    "runtime/melt_runtime/model.py": "make demo-code runs it",
    "python benchmarks/text.py build/melt-code-float32 build/melt-code-int8 build/melt-code-int4 "
    "--data build/melt-code-training/data --json docs/data/text.json": _MINUTES,
    "melt-train ouro-1.4b --teacher ByteDance/Ouro-1.4B --data tokens --out build/melt": _TRAINS,
    "melt-train ouro-1.4b --teacher ByteDance/Ouro-1.4B --data tokens --out build/melt --plot": _TRAINS,
    "melt-train ouro-1.4b --teacher ByteDance/Ouro-1.4B --data tokens --out build/run": _TRAINS,
    "python -m melt_models.tiny.teacher --out build/melt-tiny-training/teacher": _TRAINS,
    "python -m melt_models.tiny.write_data --rows 6000 --out build/training-data": _MINUTES,
    "python benchmarks/training.py --teacher build/melt-tiny-training/teacher/stage-11 --data build/training-data "
    "--out build/training-tables --jobs 2 --json docs/data/training.json": _TRAINS,
    "python -m melt_models.tiny.evaluate models/melt-tiny": _MINUTES,
    "python -m melt_models.tiny.evaluate models/melt-tiny --exit-gate --problems 1024": _MINUTES,
    "melt-train melt-tiny-exit --student models/melt-tiny --data tokens --out build/gate": _MINUTES,
    "melt-train melt-tiny-joint --student models/melt-tiny --data tokens --out build/joint": _MINUTES,
    "python -m melt_models.gguf model.gguf --out build/checkpoint": "needs a model of 98 MB (tests/test_smollm2.py)",
    "python benchmarks/smollm2.py": "fetches a model of 98 MB, and takes minutes",
    'melt generate build/gpu "Ana reports to Ben. Who is one level above Ana?" --device cuda': _GPU,
    'melt generate build/gpu "Ana reports to Ben. Who is one level above Ana?" --device cuda --cuda-graphs': _GPU,
    "optimum-cli export onnx --model models/melt-tiny --task text-generation-with-past "
    "build/melt-tiny-optimum": _OPTIMUM,
    "npm ci": _WEB,
    "node build.mjs ../../build/melt-tiny": _WEB,
    "npm start": _WEB,
    "sudo apt install g++ pkg-config libonnxruntime-dev nlohmann-json3-dev": _CPP,
    "c++ -std=c++17 -O2 generate.cpp -o generate $(pkg-config --cflags --libs libonnxruntime nlohmann_json)": _CPP,
    "./generate ../../build/melt-tiny 4 20 1 56 3": _CPP,
    "export RAY_USAGE_STATS_ENABLED=0": "sets a variable of the shell",
    "benchmarks/peers/install.sh": _PEERS,
    "python benchmarks/peers/compare.py --rounds 7": _PEERS,
    "python benchmarks/serving.py build/bench/melt-1.6b-4-int8 build/bench/melt-1.6b-4-int4 --requests 2 "
    "--clients 1,2,4,8,16 --json docs/data/serving.json": _FULL_SIZE,
    "python benchmarks/serving.py build/smollm2/int4-blocks-of-32-embedding-int8 --requests 2 --clients 1,8,32 "
    "--peer build/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --json docs/data/serving-smollm2.json": _PEERS,
    "python benchmarks/reuse.py build/smollm2/int4-blocks-of-32-embedding-int8 --text benchmarks/texts/canal.txt "
    "--chunks 500 --rounds 3": _FULL_SIZE,
    "python benchmarks/reuse.py build/melt-code-int8 --text runtime/melt_runtime/model.py --chunks 64 --rounds 3": (
        _FULL_SIZE
    ),
    "melt bench --shape melt-1.6b:4 --precision int8": _FULL_SIZE,
    "python benchmarks/passes.py build/peers/4-layers-of-2048-gated/melt-int8": _PEERS,
    "python benchmarks/passes.py build/peers/30-layers-of-576/melt-int4-alone --nodes 1": _PEERS,
    "melt bench --shape melt-1.6b --shape ouro-1.4b --loops 1,4 --positions 100,1000,4000 --chunks 512": _FULL_SIZE,
    "melt bench --shape melt-1.6b --shape ouro-1.4b --loops 1,2,4,8 --positions 100,1000,4000 "
    "--plot bench.png": _FULL_SIZE,
    "melt bench --shape melt-1.6b:4 --kv-cache float,int8,int4 --loops 4 --positions 100,1000,4000,16000 "
    "--chunks 128,512": _FULL_SIZE,
    "melt bench --shape melt-1.6b:4 --kv-cache float,int8,int4 --positions 16000 --json bench.json": _FULL_SIZE,
    "melt bench --shape melt-1.6b:4 --shape ouro-1.4b:4 --precision int8": _FULL_SIZE,
    "python benchmarks/batches.py build/bench/melt-1.6b-4-int4 build/bench/melt-1.6b-4-int8 "
    "build/bench/ouro-1.4b-4-int4 build/bench/ouro-1.4b-4-int8 build/melt-tiny --rounds 7": _FULL_SIZE,
    "melt bench --shape melt-1.6b --shape ouro-1.4b --precision int8": _FULL_SIZE,
    "python benchmarks/decoding.py build/bench/melt-1.6b-int8 build/bench/melt-1.6b-int4 build/bench/ouro-1.4b-int8 "
    "--positions 100 --tokens 24 --rounds 1 --shares 70,90,100 --lags 1 --json "
    "docs/data/decoding-full.json": _FULL_SIZE,
    "python benchmarks/decoding.py build/bench/melt-1.6b-4-int8 build/bench/melt-1.6b-4-int4 --rounds 3 "
    "--tokens 16": _FULL_SIZE,
    "python benchmarks/decoding.py build/bench/melt-1.6b-int8 --positions 4000 --rounds 1 --shares 90,100 "
    "--lags 1": _FULL_SIZE,
    "python benchmarks/decoding.py build/bench/ouro-1.4b-int8 build/bench/melt-1.6b-int4 build/bench/ouro-1.4b-int4 "
    "--positions 4000 --tokens 16 --rounds 1 --shares 90 --lags 1": _FULL_SIZE,
    "python benchmarks/decoding.py build/bench/ouro-1.4b-4-int8 build/bench/ouro-1.4b-4-int4 --rounds 1 --tokens 16 "
    "--shares 70,90,100": _FULL_SIZE,
    "python benchmarks/answers.py runtime/melt_runtime/demo/melt-tiny --questions 100 "
    "--json docs/data/answers.json": _MINUTES,
    "melt-export --shape melt-1.6b --out build/bench --precision int4": _FULL_SIZE,
    "python benchmarks/memory.py build/melt-1.6b-int4 build/ouro-1.4b-int4 --json docs/data/memory.json": _FULL_SIZE,
}
NOT_RUN_PYTHON = {
    "from openai import OpenAI": _SERVES,
    "import os  # GenAI reads this variable at its import": _GENAI,
    "import os  # ONNX Runtime reads this variable at its import": _OPTIMUM,
    "from melt_runtime import CudaOptions, MeltModel": _GPU,
}
"""By the first line of the block."""


def conversations(count: int) -> str:
    """Text of the kind that melt-tiny learned, as its template writes it: on any other, rounding costs it too much."""
    draw = random.Random(0)
    turns = [turn for _ in range(count) for turn in make_problem(draw, True, 4, kinds=("steps",)).messages()]
    return AutoTokenizer.from_pretrained(MELT_TINY).apply_chat_template(turns, tokenize=False)


QUESTION = "Ana reports to Ben. Ben reports to Cleo. Who is two levels above Ana?\n"
BUNDLES = ("build/melt-tiny", "build/my-model", "build/ouro", "build/small", "build/melt-bundle")
CHECKPOINTS = ("CHECKPOINT", "build/melt/model", "models/melt-tiny")
LOOPLMS = ("ByteDance/Ouro-1.4B",)
TEXTS = {
    "texts.jsonl": "".join(json.dumps({"text": QUESTION * 40}) + "\n" for _ in range(40)),
    "book.txt": conversations(12),
    "question.txt": QUESTION,
    "questions.txt": QUESTION * 2,
    "prompts.jsonl": "".join(json.dumps({"id": number, "prompt": QUESTION.strip()}) + "\n" for number in range(3)),
}
LINKED = ("export.py", "benchmarks", "examples", "README.md", "Makefile", "integrations")

EXAMPLES = shell_examples()


def export_work(example: Example) -> tuple | None:
    """What an export does, whatever its output and its small checkpoint are called; None for other commands."""
    if example.words[0] != "melt-export" and example.words[:2] != ["python", "export.py"]:
        return None
    values = vars(export_parser().parse_args(example.words[1 if example.words[0] == "melt-export" else 2 :]))
    is_looplm = values["checkpoint"] in LOOPLMS
    return (is_looplm, *(str(value) for name, value in values.items() if name not in ("checkpoint", "out")))


def runnable() -> Iterator[Example]:
    """Examples that can run; of exports that do the same the first one."""
    done = set()
    for example in EXAMPLES:
        work = export_work(example)
        if example.text in NOT_RUN or work in done:
            continue
        if work is not None:
            done.add(work)
        yield example


@pytest.fixture(scope="module")
def supplies(tmp_path_factory, tiny_bundle) -> dict[str, Path]:
    """The real things behind the names."""
    folder = tmp_path_factory.mktemp("supplies")
    checkpoint = shutil.copytree(MELT_TINY, folder / "checkpoint", ignore=shutil.ignore_patterns("evaluation.jsonl"))
    looplm = write_ouro(folder / "ouro")
    for name, text in TEXTS.items():
        (folder / name).write_text(text, encoding="utf-8")
    return {
        **dict.fromkeys(BUNDLES, tiny_bundle),
        **dict.fromkeys(CHECKPOINTS, Path(checkpoint)),
        **dict.fromkeys(LOOPLMS, looplm),
        **{name: folder / name for name in TEXTS},
    }


@pytest.fixture
def supply(supplies, tmp_path, monkeypatch) -> Callable[..., None]:
    """Makes an empty checkout to work in, with the things that an example names."""
    for name in LINKED:
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MELT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def make(*names: str) -> None:
        for name in names:
            if name in supplies:
                (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / name).symlink_to(supplies[name])

    return make


@pytest.fixture
def signals() -> Iterator[None]:
    """Puts back what a command decided about signals."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    kept |= {signal.SIGHUP: signal.getsignal(signal.SIGHUP)} if hasattr(signal, "SIGHUP") else {}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


def start(words: list[str], monkeypatch) -> int:
    """Runs a command of ours in this process; returns its exit status."""
    if words[0] in COMMANDS:
        return importlib.import_module(COMMANDS[words[0]]).main(words[1:])
    assert words[0] == "python", f"{words[0]} is no command of ours: NOT_RUN has it with its reason, or it must go"
    if words[1] == "export.py":
        return importlib.import_module("melt_export.cli").main(words[2:])
    if words[1] == "-m":
        return importlib.import_module(words[2]).main(words[3:])
    monkeypatch.setattr(sys, "argv", words[1:])
    monkeypatch.syspath_prepend(str(Path(words[1]).parent))
    with pytest.raises(SystemExit) as exited:
        runpy.run_path(words[1], run_name="__main__")
    return exited.value.code or 0


@pytest.mark.parametrize("example", list(runnable()), ids=lambda example: f"{example.place}: {example.text}")
def test_an_example_runs_as_it_stands(example, supply, signals, capsys, monkeypatch):
    assert not example.folder
    outputs = [example.words[place + 1] for place, word in enumerate(example.words) if word == "--out"]
    supply(*{word for word in (*example.words, example.input) if word and word not in outputs})
    typed = Path(example.input).read_text(encoding="utf-8") if example.input else QUESTION
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(typed.encode()), encoding="utf-8"))
    status = start(example.words, monkeypatch)
    captured = capsys.readouterr()
    assert status == 0, captured.err
    assert "error:" not in captured.err
    assert all(Path(output).is_dir() or Path(output).read_text(encoding="utf-8").strip() for output in outputs)
    assert captured.out.strip() or example.words[1] in ("batch", "benchmarks/pictures.py")  # those write files alone


@pytest.mark.parametrize(("place", "text"), python_examples())
def test_a_block_of_python_runs_as_it_stands(place, text, supply, capsys):
    if text.partition("\n")[0] in NOT_RUN_PYTHON:
        ruff = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F", "-"]
        done = subprocess.run(ruff, input=text, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
        return
    supply(*(name for name in BUNDLES if f'"{name}"' in text))
    exec(compile(text, place, "exec"), {"__name__": "__main__"})


class Parsed(BaseException):
    """A command's arguments were parsed, and nothing more shall happen."""


def check_arguments(words: list[str], monkeypatch) -> None:
    """The command's own parser takes them."""
    real = argparse.ArgumentParser.parse_args

    def parse(self, *arguments, **options):
        real(self, *arguments, **options)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    monkeypatch.chdir(ROOT)
    with pytest.raises(Parsed):
        start(words, monkeypatch)
    if words[0] == "melt-train":
        read_recipe(recipe_path(words[1]))


def check_target(words: list[str]) -> None:
    """The Makefile has it, and says what it is for."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in words[1:]:
        assert re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE), f"make has no target {target}"
        assert f"## {target}: " in makefile


def check_install(words: list[str]) -> None:
    """Its extras and folders are ours."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for word in words[2:]:
        found = re.fullmatch(r"(\.|melt-onnx)\[(.*)\]", word)
        if found is not None:
            assert set(found[2].split(",")) <= extras.keys(), word
        elif word.startswith("."):
            assert (ROOT / word / "pyproject.toml").is_file()


def check_files(example: Example) -> None:
    """Files of ours that it names exist; scripts of npm stand in the package's file."""
    folder = ROOT / example.folder
    for word in example.words:
        if word.endswith((".py", ".mjs", ".cpp", ".sh")) or word.startswith(("models/", "benchmarks/")):
            assert (folder / word).exists(), word
    if example.words[0] == "npm":
        assert (folder / "package-lock.json").is_file()
        assert (
            example.words[1] == "ci" or example.words[1] in json.loads((folder / "package.json").read_text())["scripts"]
        )


@pytest.mark.parametrize(
    "example",
    [example for example in EXAMPLES if example.text in NOT_RUN],
    ids=lambda example: f"{example.place}: {example.text}",
)
def test_what_cannot_run_here_is_right_as_far_as_can_be_seen(example, monkeypatch):
    check_files(example)
    program = example.words[0]
    if program == "make":
        check_target(example.words)
    elif program == "pip":
        check_install(example.words)
    elif (program in COMMANDS or program == "python") and example.words[1:] != ["benchmarks/smollm2.py"]:
        check_arguments(example.words, monkeypatch)


def test_the_tables_of_what_cannot_run_hold_nothing_else():
    assert NOT_RUN.keys() <= {example.text for example in EXAMPLES}
    assert NOT_RUN_PYTHON.keys() <= {text.partition("\n")[0] for _, text in python_examples()}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_commands_that_sentences_name_exist(path):
    for text in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", path.read_text(encoding="utf-8")):
        words = text.split()
        if words[0] == "make" and len(words) > 1:
            check_target(words[:2])
        elif words[0] == "melt" and len(words) > 1:
            assert words[1] in (*SUBCOMMANDS, "COMMAND", "--version"), text
        elif words[0] == "python" and words[1].endswith(".py"):
            assert (ROOT / words[1]).is_file(), text
        elif words[:2] == ["python", "-m"]:
            assert importlib.util.find_spec(words[2]) is not None, text
