"""The programs of ``examples`` run as their first lines say. The page has tests of its own (test_web.py)."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, new_user

from melt_runtime import MeltModel
from melt_runtime.bundle.contract import SCHEMA_VERSION
from melt_runtime.device.ort import ort

GOLDEN = json.loads((Path(__file__).parent / "goldens" / "melt-tiny.json").read_text())


def test_ten_lines_of_python(tiny_bundle):
    run = [sys.executable, ROOT / "examples" / "ask.py", tiny_bundle]
    lines = subprocess.run(run, check=True, capture_output=True, text=True).stdout.splitlines()
    assert [line.strip() for line in lines[1::2]] == ["Cleo.", "Cleo."]


@pytest.fixture(scope="session")
def cpp_headers() -> Path:
    """The folder with the headers of examples/cpp: the machine's own, or Debian's, fetched once."""
    fetched = ROOT / "build" / "environments" / "cpp" / "usr" / "include"
    for folder in (Path("/usr/include"), fetched):
        if (folder / "onnxruntime").is_dir() and (folder / "nlohmann").is_dir():
            return folder
    if shutil.which("apt-get") is None:
        pytest.skip("no package index has ONNX Runtime's C++ headers; Debian 13 does: libonnxruntime-dev")
    fetch = [ROOT / "examples" / "cpp" / "headers.sh", fetched.parent.parent]
    done = subprocess.run(fetch, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"Debian's packages with ONNX Runtime's C++ headers cannot be fetched: {done.stderr[-200:]}")
    return fetched


@pytest.fixture(scope="session")
def cpp_program(cpp_headers, tmp_path_factory) -> Path:
    """The program of examples/cpp, compiled against the library that Python uses."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed")
    folder = tmp_path_factory.mktemp("cpp")
    library = next((Path(ort.__file__).parent / "capi").glob("libonnxruntime.so.*"))
    for name in ("libonnxruntime.so", "libonnxruntime.so.1"):
        (folder / name).symlink_to(library)
    source = ROOT / "examples" / "cpp" / "generate.cpp"
    flags = [
        "-std=c++17",
        "-Wall",
        "-Wextra",
        "-isystem",
        cpp_headers,
        "-isystem",
        cpp_headers / "onnxruntime",
        "-Werror",
    ]
    link = [f"-L{folder}", "-lonnxruntime", f"-Wl,-rpath,{folder}"]
    subprocess.run([compiler, *flags, source, "-o", folder / "generate", *link], check=True)
    return folder / "generate"


def run_cpp(program: Path, *arguments) -> subprocess.CompletedProcess[str]:
    command, user = [program, *map(str, arguments)], new_user(program.parent / "home")
    return subprocess.run(command, capture_output=True, text=True, errors="replace", env=user)


@pytest.fixture
def bundle_texts(tiny_bundle, tmp_path) -> Path:
    """A bundle whose manifest and settings a test may change; graphs and weights are links."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in tiny_bundle.iterdir():
        if path.suffix == ".json":
            shutil.copyfile(path, copy / path.name)
        else:
            (copy / path.name).hardlink_to(path)
    return copy


def change(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("loops", [1, 4])
def test_cpp_gives_pythons_tokens(loops, cpp_program, bundle_texts):
    """The answer with the token that ends it; two hundred tokens where none does."""
    expected = GOLDEN["loops"][str(loops)]["tokens"]
    done = run_cpp(cpp_program, bundle_texts, loops, 200, *GOLDEN["prompt"])
    assert [int(token) for token in done.stdout.split()] == expected[: expected.index(3) + 1]
    (bundle_texts / "generation_config.json").write_text("{}")
    done = run_cpp(cpp_program, bundle_texts, loops, 200, *GOLDEN["prompt"])
    assert [int(token) for token in done.stdout.split()] == expected
    change(bundle_texts / "generation_config.json", stop_ids=[expected[5], 3, expected[2]])
    done = run_cpp(cpp_program, bundle_texts, loops, 200, *GOLDEN["prompt"])
    assert [int(token) for token in done.stdout.split()][-1] in (expected[5], 3, expected[2])
    assert len(done.stdout.split()) <= 3
    assert not (cpp_program.parent / "home").exists()  # no telemetry


def test_cpp_runs_other_gates_and_weights(cpp_program, random_bundle):
    """The loop's number as an input, no latent state, rounded weights."""
    bundle = random_bundle("int4", gate_kind="mean", hidden_size=128)
    prompt = list(range(3, 22))
    model = MeltModel.load(bundle, device="cpu", capacity=64)
    expected = model.generate(prompt, loops=3, max_new_tokens=20, temperature=0).token_ids
    done = run_cpp(cpp_program, bundle, 3, 20, *prompt)
    assert [int(token) for token in done.stdout.split()] == list(expected)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_cpp_reads_prompts_through_their_own_loop(precision, cpp_program, random_bundle):
    """Chunks of 16, of which the last has 3 tokens and runs the bundle's own."""
    bundle = random_bundle(precision, prompts="int8", chunk_size=16)
    prompt = list(range(3, 22))
    model = MeltModel.load(bundle, device="cpu", capacity=64)
    expected = model.generate(prompt, loops=3, max_new_tokens=20, temperature=0).token_ids
    done = run_cpp(cpp_program, bundle, 3, 20, *prompt)
    assert [int(token) for token in done.stdout.split()] == list(expected)


def test_cpp_refuses_arguments_in_a_sentence(cpp_program, tiny_bundle, tmp_path):
    whole = "must be a whole number from"
    for arguments, message in (
        ((), "usage: generate BUNDLE LOOPS NEW_TOKENS ID [ID ...]"),
        ((tiny_bundle, 0, 8, 5), f"LOOPS {whole} 1 to 1024, got 0"),
        ((tiny_bundle, 2**31, 8, 5), f"LOOPS {whole} 1 to 1024, got 2147483648"),
        ((tiny_bundle, "four", 8, 5), f"LOOPS {whole} 1 to 1024, got four"),
        ((tiny_bundle, 4, 2.5, 5), f"NEW_TOKENS {whole} 1 to 67108864, got 2.5"),
        ((tiny_bundle, 4, 8, -1), f"ID {whole} 0 to 67108864, got -1"),
        ((tiny_bundle, 4, 8, "5x"), f"ID {whole} 0 to 67108864, got 5x"),
        ((tiny_bundle, 4, 8, ""), f"ID {whole} 0 to 67108864, got"),
        ((tiny_bundle, 4, 8, 100000), "ID must be from 0 to"),
        ((tiny_bundle, 4, 67000000, 5), "1 ids and 67000000 new ones exceed the"),
        ((tmp_path / "absent", 4, 8, 5), "manifest.json cannot be read: give the folder of a bundle"),
        ((tmp_path, 4, 8, 5), "manifest.json cannot be read: give the folder of a bundle"),
    ):
        done = run_cpp(cpp_program, *arguments)
        assert (done.returncode, done.stdout) == (1, "")
        assert message in done.stderr


def test_cpp_refuses_bundles_in_a_sentence(cpp_program, bundle_texts):
    manifest, settings = bundle_texts / "manifest.json", bundle_texts / "generation_config.json"
    values = json.loads(manifest.read_text())

    def with_model(**changes) -> str:
        return json.dumps({**values, "model": {**values["model"], **changes}})

    for path, content, message in (
        (manifest, json.dumps({**values, "schema_version": 3}), f"schema_version must be {SCHEMA_VERSION}, got 3"),
        (manifest, json.dumps({**values, "schema_version": "4"}), "schema_version must be a whole number from 0 to"),
        (manifest, json.dumps({**values, "model": 5}), "manifest.json: model must be an object, got 5"),
        (manifest, json.dumps({**values, "activations": "float16"}), "activations must be float32"),
        (manifest, with_model(cache_kind="per_loop"), "a LoopLM has one for each loop"),
        (manifest, with_model(layers=2**31), "layers must be a whole number from 1 to 1024, got 2147483648"),
        (manifest, with_model(layers=2**63), "layers must be a whole number from 1 to 1024, got 9223372036854775808"),
        (manifest, with_model(trained_chunk=0), "trained_chunk must be a whole number from 1"),
        (manifest, with_model(has_latent="no"), 'has_latent must be true or false, got "no"'),
        (manifest, with_model(layers=3), "does not fit its graphs: copy the bundle again\n  layers is 3, "),
        (manifest, with_model(gate_kind="mean", max_positions=5000), "max_positions is 5000, "),
        (manifest, with_model(vocab_size=2), "stop_ids must be a whole number from 0 to 1, got 3"),
        (manifest, "[1]", "manifest.json: the file must hold a JSON object"),
        (manifest, "[" * 20000, "manifest.json is not JSON (nested too deep)"),
        (settings, '{"stop_ids": ' + "[" * 200000 + "]" * 200000 + "}", "is not JSON (nested too deep)"),
        (manifest, '{"schema_version": "\udc80"}', "manifest.json is not JSON ("),
        (settings, '{"stop_ids": 3}', "generation_config.json: stop_ids must be a list of token ids, got 3"),
        (settings, '{"stop_ids": [1.5]}', "stop_ids must be a whole number from 0 to"),
        (settings, "", "generation_config.json is not JSON ("),
    ):
        before = path.read_bytes()
        path.write_text(content, encoding="utf-8", errors="surrogateescape")
        done = run_cpp(cpp_program, bundle_texts, 1, 8, 5)
        path.write_bytes(before)
        assert done.returncode == 1, content[:80]
        assert message in done.stderr, content[:80]
    for name in ("loop.onnx", "weights.data", "generation_config.json"):
        (bundle_texts / name).unlink()
        done = run_cpp(cpp_program, bundle_texts, 4, 8, 5)
        assert done.returncode == 1
        assert name in done.stderr
