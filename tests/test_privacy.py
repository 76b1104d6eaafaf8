"""Nothing leaves this machine: ONNX Runtime's telemetry is off on every way in, and no host is looked up."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import random_model, save_checkpoint

from melt_runtime.device.ort import TELEMETRY, VARIABLE, ort

DOCTOR = "from melt_runtime.device.doctor import diagnose; print(diagnose())"
NOTHING = "nothing leaves this machine"
EVERYTHING = """
import sys
from pathlib import Path

calls = []
sys.addaudithook(lambda event, args: event.startswith("socket.") and calls.append((event, *args[1:])))
from melt_export.bundle import ExportOptions, export_bundle
from melt_runtime import MeltModel
from melt_runtime.device.doctor import diagnose

checkpoint, out = map(Path, sys.argv[1:])
export_bundle(checkpoint, out, ExportOptions(verified=False, quantized_caches=False))
model = MeltModel.load(out, device="cpu", capacity=64)
assert model.generate("Ana reports to Ben.", max_new_tokens=3, stop_ids=()).token_ids
print(diagnose())
assert calls == [], calls
"""


def run(code: str, home: Path, *arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a process with the home folder and no other variables: on CI ONNX Runtime has no telemetry."""
    kept = {name: os.environ[name] for name in ("PATH", "OMP_NUM_THREADS") if name in os.environ}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**kept, "HOME": str(home), **variables})


def test_exporting_and_answering_call_no_server_and_leave_no_identity(tmp_path):
    checkpoint = save_checkpoint(random_model(num_hidden_layers=1), tmp_path / "checkpoint")
    home = tmp_path / "home"
    home.mkdir()
    done = run(EVERYTHING, home, checkpoint, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert NOTHING in done.stdout
    assert list(home.rglob("*")) == []


@pytest.mark.parametrize("value", [None, "", "disabled"])
def test_telemetry_is_off_unless_a_user_keeps_it(value, tmp_path):
    """Below a file no folder can be made: ONNX Runtime's telemetry warns of such a home."""
    home = tmp_path / "file"
    home.touch()
    done = run(DOCTOR, home, **({} if value is None else {VARIABLE: value}))
    assert done.stderr == ""
    assert NOTHING in done.stdout


@pytest.mark.parametrize(
    ("first", "variables", "state"),
    [
        ("", {VARIABLE: "0"}, f"on, as {VARIABLE}=0 asks"),
        ("import onnxruntime;", {}, "on: onnxruntime was imported before melt_runtime"),
    ],
)
def test_telemetry_that_is_on_is_told(first, variables, state, tmp_path):
    """A proxy that is not there keeps these events from anybody. The files are those that telemetry leaves."""
    done = run(first + DOCTOR, tmp_path, https_proxy="http://127.0.0.1:9", **variables)
    assert f"ONNX Runtime's telemetry is {state}" in done.stdout
    assert NOTHING not in done.stdout
    libraries = Path(ort.__file__).parent.glob("capi/onnxruntime_pybind11_state*")
    has_telemetry = any(VARIABLE.encode() in path.read_bytes() for path in libraries)
    assert any(path.is_file() for path in tmp_path.rglob("*")) == has_telemetry


def test_these_tests_send_no_telemetry():
    assert TELEMETRY == "off"


def test_requests_to_the_hub_carry_no_telemetry():
    code = "import melt_export.cli; from huggingface_hub import constants; print(constants.HF_HUB_DISABLE_TELEMETRY)"
    assert run(code, Path("/")).stdout == "True\n"
    assert run(code, Path("/"), HF_HUB_DISABLE_TELEMETRY="0").stdout == "False\n"
