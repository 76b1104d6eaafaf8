"""The programs of ``examples`` run as their first lines say. The page has tests of its own (test_web.py)."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import onnxruntime
import pytest
from conftest import ROOT

from melt_runtime import MeltModel
from melt_runtime.contract import SCHEMA_VERSION

GOLDEN = json.loads((Path(__file__).parent / "goldens" / "melt-tiny.json").read_text())


def test_ten_lines_of_python(tiny_bundle):
    run = [sys.executable, ROOT / "examples" / "ask.py", tiny_bundle]
    lines = subprocess.run(run, check=True, capture_output=True, text=True).stdout.splitlines()
    assert [line.strip() for line in lines[1::2]] == ["Cleo.", "Cleo."]


@pytest.fixture(scope="session")
def cpp_program(tmp_path_factory) -> Path:
    """The program of examples/cpp, compiled against the library that Python uses."""
    headers = "#include <nlohmann/json.hpp>\n#include <onnxruntime_cxx_api.h>\n"
    flags = ["-std=c++17", "-Wall", "-Wextra", "-I/usr/include/onnxruntime"]
    compiler = shutil.which("g++")
    probe = [compiler, *flags, "-x", "c++", "-E", "-"]
    if compiler is None or subprocess.run(probe, input=headers, capture_output=True, text=True).returncode:
        pytest.skip("no package index has ONNX Runtime's C++ headers; Debian 13 does: libonnxruntime-dev")
    folder = tmp_path_factory.mktemp("cpp")
    library = next((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*"))
    for name in ("libonnxruntime.so", "libonnxruntime.so.1"):
        (folder / name).symlink_to(library)
    source = ROOT / "examples" / "cpp" / "generate.cpp"
    link = [f"-L{folder}", "-lonnxruntime", f"-Wl,-rpath,{folder}"]
    subprocess.run([compiler, *flags, source, "-o", folder / "generate", *link], check=True)
    return folder / "generate"


def run_cpp(program: Path, *arguments) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, *map(str, arguments)], capture_output=True, text=True)


@pytest.mark.parametrize("loops", [1, 4])
def test_cpp_gives_pythons_tokens(loops, cpp_program, tiny_bundle):
    done = run_cpp(cpp_program, tiny_bundle, loops, 200, *GOLDEN["prompt"])
    assert [int(token) for token in done.stdout.split()] == GOLDEN["loops"][str(loops)]["tokens"]


@pytest.mark.parametrize(("gate_kind", "precision"), [("mean", "float32"), ("last", "int4")])
def test_cpp_runs_other_gates_and_weights(gate_kind, precision, cpp_program, random_bundle):
    bundle = random_bundle(precision, gate_kind=gate_kind, hidden_size=128)
    prompt = list(range(3, 22))
    model = MeltModel.load(bundle, device="cpu", capacity=64)
    expected = model.generate(prompt, loops=3, max_new_tokens=20, temperature=0, stop_ids=()).token_ids
    done = run_cpp(cpp_program, bundle, 3, 20, *prompt)
    assert [int(token) for token in done.stdout.split()] == list(expected)


def test_cpp_says_what_it_cannot_run(cpp_program, bundle_copy, random_bundle):
    manifest = bundle_copy / "manifest.json"
    manifest.write_text(manifest.read_text().replace(f'"schema_version": {SCHEMA_VERSION}', '"schema_version": 2'))
    looplm = random_bundle(gate_kind="none")
    cases = (
        ((bundle_copy, 4, 8, 5), f"schema_version must be {SCHEMA_VERSION}, got 2"),
        ((looplm, 4, 8, 5), "a LoopLM has one for each loop"),
        ((bundle_copy, 0, 8, 5), "LOOPS and NEW_TOKENS must be at least 1"),
        ((bundle_copy / "absent", 4, 8, 5), "manifest.json cannot be read"),
    )
    for arguments, message in cases:
        done = run_cpp(cpp_program, *arguments)
        assert done.returncode == 1
        assert message in done.stderr
