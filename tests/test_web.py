"""The page of examples/web in headless Chromium: Python's tokens, and its errors."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT, random_model
from tolerances import INTEGER_PRODUCTS, PARITY, assert_close, assert_greedy

from melt_runtime import MeltModel
from melt_runtime.contract import SCHEMA_VERSION

PAGE = ROOT / "examples" / "web"
GOLDEN = json.loads((Path(__file__).parent / "goldens" / "melt-tiny.json").read_text())
pytestmark = pytest.mark.skipif(shutil.which("npm") is None, reason="npm is not installed")


@pytest.fixture(scope="session")
def web() -> Path:
    """A copy of the page's folder with its packages, fetched once for each lock file."""
    folder = ROOT / "build" / "web"
    folder.mkdir(parents=True, exist_ok=True)
    lock = (PAGE / "package-lock.json").read_text()
    stamp = folder / "ready"
    for path in PAGE.iterdir():
        if path.is_file():
            shutil.copyfile(path, folder / path.name)
    if not stamp.is_file() or stamp.read_text() != lock:
        subprocess.run(["npm", "ci", "--no-audit", "--no-fund", "--silent"], cwd=folder, check=True)
        stamp.write_text(lock)
    return folder


def check(web: Path, bundle: Path, out: Path, **task) -> dict:
    """Builds the page around a bundle, opens it, and returns what it did."""
    subprocess.run(["node", "build.mjs", bundle, out], cwd=web, check=True, capture_output=True)
    task = {"prompt": GOLDEN["prompt"], "question": GOLDEN["question"], **task}
    done = subprocess.run(
        ["node", "check.mjs", out], cwd=web, input=json.dumps(task), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_browser_gives_pythons_tokens(web, tiny_bundle, tmp_path):
    done = check(web, tiny_bundle, tmp_path / "dist", loops=[1, 4], newTokens=200)
    assert done["status"] == ["", "2 layers of 96, trained with 4 loops, one KV cache a layer"]
    assert done["threads"] is True
    assert done["encoded"] == GOLDEN["prompt"]
    assert done["tokens"] == {loops: GOLDEN["loops"][loops]["tokens"] for loops in ("1", "4")}
    assert done["answer"] == "Dan."
    assert "loops must be a whole number of at least 1, got 0" in done["errors"][0]
    assert "exceed the capacity of 512" in done["errors"][1]
    assert "this model needs about" in done["memory"]
    assert "--precision int4" in done["memory"]


@pytest.mark.parametrize(
    ("changes", "tolerance"),
    # wasm has kernels of its own for rounded weights, which round activations otherwise.
    [
        ({"gate_kind": "none"}, PARITY["float32"]),
        ({"gate_kind": "mean"}, PARITY["float32"]),
        ({"precision": "int8"}, INTEGER_PRODUCTS),
    ],
    ids=["looplm", "mean", "int8"],
)
def test_other_models_give_the_runtimes_logits(web, random_bundle, tmp_path, changes, tolerance):
    """A cache for each loop, the loop's number as an input, rounded weights; a prompt of two chunks."""
    bundle = random_bundle(**changes)
    ids = [7, 400, 31, 9, 9, 220, 5, 66, 12, 300, 41]
    done = check(web, bundle, tmp_path / "dist", loops=[3], newTokens=12, prompt=ids, question="Ana")
    model = MeltModel.load(bundle, device="cpu", capacity=64)
    expected = model.new_runner().prefill(ids, 3)
    assert_close(done["logits"]["3"], expected, tolerance)
    if "gate_kind" in changes:
        assert_greedy(random_model(**changes), ids, done["tokens"]["3"], loops=3)


def test_what_the_page_cannot_run_is_said_on_the_page(web, tiny_bundle, tmp_path):
    done = check(web, tiny_bundle, tmp_path / "dist", withoutSimd=True)
    assert done["status"][0] == "error"
    assert "has no WebAssembly SIMD" in done["status"][1]
    other = shutil.copytree(tiny_bundle, tmp_path / "other")
    manifest = json.loads((other / "manifest.json").read_text())
    (other / "manifest.json").write_text(json.dumps({**manifest, "schema_version": SCHEMA_VERSION - 1}))
    done = check(web, other, tmp_path / "dist")
    assert done["status"][0] == "error"
    assert f"has schema_version {SCHEMA_VERSION - 1}, this page reads {SCHEMA_VERSION}" in done["status"][1]


def test_the_page_reads_the_schema_that_is_written():
    assert f"SCHEMA_VERSION = {SCHEMA_VERSION};" in (PAGE / "melt.js").read_text()
