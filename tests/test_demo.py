"""``melt demo`` and the bundle in the package: what it answers, and that the exporter would make the same one today."""

import json
import re
import subprocess
import sys

import numpy as np
import onnx
import pytest
from conftest import MELT_TINY
from onnx import numpy_helper
from tolerances import CALIBRATED, TORCH, assert_close

from melt_export.bundle import ExportOptions, export_bundle
from melt_runtime.bundle.manifest import read_manifest
from melt_runtime.cli.demo import BUNDLE
from melt_runtime.cli.main import main
from melt_runtime.memory.estimate import format_bytes, plan_memory

MEASURED = ("parity", "quality", "producer")
"""What a manifest says of the machine that made it."""
ROW = re.compile(r"^(\d+) +([\d.]+ MB) +([\d.]+ MB) +[\d.]+ ms +[\d.]+ ms +(.*)$", re.MULTILINE)


def test_the_shipped_model_answers_one_step_further_with_each_loop(capsys):
    assert main(["demo"]) == 0
    captured = capsys.readouterr()
    rows = ROW.findall(captured.out)
    assert [row[0] for row in rows] == ["1", "2", "3", "4"]
    assert [row[3] for row in rows] == ["Ana.", "Ben.", "Dan.", "Dan."]
    assert len({row[1] for row in rows}) == 1
    plans = [plan_memory(read_manifest(BUNDLE), loops=loops) for loops in (1, 2, 3, 4)]
    assert rows[0][1] == format_bytes(plans[0].state.total_bytes)
    assert [row[2] for row in rows] == [format_bytes(plan.per_loop.total_bytes) for plan in plans]
    assert f"melt chat {BUNDLE}" in captured.out
    assert captured.err == ""


def test_a_question_of_ones_own_at_other_depths(capsys):
    question = "Ana reports to Ben. Ben works for Cleo. Cleo reports to Dan. Who is two levels above Ana?"
    assert main(["demo", question, "--loops", "2,3"]) == 0
    out = capsys.readouterr().out
    assert [(row[0], row[3]) for row in ROW.findall(out)] == [("2", "Cleo."), ("3", "Cleo.")]
    assert question in out
    assert "Cleo reports to Ana" not in out


@pytest.mark.parametrize(("options", "status"), [(["--loops", "2,0"], 1), (["--loops", "two"], 2)])
def test_bad_depths_are_refused_before_anything_is_loaded(options, status, capsys):
    try:
        found = main(["demo", *options])
    except SystemExit as exited:
        found = exited.code
    captured = capsys.readouterr()
    assert found == status
    assert captured.out == ""
    assert "error: " in captured.err


def test_the_demo_runs_without_torch():
    code = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'onnx', 'melt_models', 'melt_export'): sys.modules[name] = None\n"
        "from melt_runtime.cli.main import main\n"
        "sys.exit(main(['demo', '--loops', '3']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ROW.findall(done.stdout)[0][3] == "Dan."


def content(path) -> dict:
    """A graph in plain words, its weights by name, type and shape."""
    graph = onnx.load(path, load_external_data=False).graph
    return {
        "nodes": [
            (node.domain, node.op_type, list(node.input), list(node.output), sorted(map(str, node.attribute)))
            for node in graph.node
        ],
        "inputs": list(map(str, graph.input)),
        "outputs": list(map(str, graph.output)),
        "initializers": {tensor.name: (tensor.data_type, list(tensor.dims)) for tensor in graph.initializer},
    }


def test_the_exporter_makes_the_bundle_that_ships(tmp_path):
    again = tmp_path / "again"
    export_bundle(MELT_TINY, again, ExportOptions("int8", block=32, verified=False, prompts="none"))
    ours, theirs = (json.loads((folder / "manifest.json").read_text()) for folder in (BUNDLE, again))
    hint = "the bundle in the package is of another exporter: make demo-bundle"
    assert ours.keys() == theirs.keys(), hint
    files = [manifest.pop("files") for manifest in (ours, theirs)]
    assert files[0].keys() == files[1].keys() == {path.name for path in BUNDLE.iterdir()} - {"manifest.json"}, hint
    for name in ours.keys() - set(MEASURED):
        assert ours[name] == theirs[name], f"{name}: {hint}"
    for name in files[0]:
        if name.endswith(".onnx"):
            assert content(BUNDLE / name) == content(again / name), f"{name}: {hint}"
            for folder in (BUNDLE, again):
                assert b".py" not in (folder / name).read_bytes(), f"{folder / name} names files of where it was made"
            compare_weights(name, *(onnx.load(folder / name).graph.initializer for folder in (BUNDLE, again)))
        elif name != "weights.data":
            assert (BUNDLE / name).read_bytes() == (again / name).read_bytes(), f"{name}: {hint}"


def compare_weights(name, shipped, made) -> None:
    for left, right in zip(shipped, made, strict=True):
        ours, theirs = numpy_helper.to_array(left), numpy_helper.to_array(right)
        if np.issubdtype(ours.dtype, np.floating) and ours.size:
            assert_close(theirs, ours, CALIBRATED if re.match(r"int\d_(key|value)_scale", left.name) else TORCH)
        else:
            np.testing.assert_array_equal(theirs, ours, err_msg=f"{name}: {left.name}")


def test_the_bundle_that_ships_is_small():
    assert sum(path.stat().st_size for path in BUNDLE.iterdir()) < 2_500_000
