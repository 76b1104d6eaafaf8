"""L0: which provider is taken, why, and what is said when it cannot run. The machine's own state plays no part."""

import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

from melt_runtime import CudaOptions, MeltModel, ProviderError, model
from melt_runtime.device import cuda, doctor
from melt_runtime.device.cuda import cuda_obstacle, driver_obstacle, missing_libraries
from melt_runtime.device.providers import choose_provider
from melt_runtime.loading import opening


def pretend(
    monkeypatch, built: bool = True, missing: dict[str, str] | None = None, devices: int = 1, driver: int = 13000
) -> None:
    """A machine with CUDA devices, libraries and a driver as given."""

    def answer(value):
        return lambda pointer: setattr(pointer._obj, "value", value) or 0

    names = ["CUDAExecutionProvider"] * built + ["CPUExecutionProvider"]
    library = SimpleNamespace(cuInit=lambda _: 0, cuDeviceGetCount=answer(devices), cuDriverGetVersion=answer(driver))
    monkeypatch.setattr(cuda.ort, "get_available_providers", lambda: names)
    monkeypatch.setattr(cuda.ort, "cuda_version", "13.0", raising=False)
    monkeypatch.setattr(cuda.sys, "platform", "linux")
    monkeypatch.setattr(cuda, "missing_libraries", lambda: missing or {})
    monkeypatch.setattr(cuda, "_load", lambda _: library)


def test_cpu_is_taken_without_looking_further(monkeypatch):
    monkeypatch.setattr(cuda, "cuda_obstacle", lambda _: pytest.fail("CUDA was looked at"))
    assert choose_provider("cpu", "float32").device == "cpu"


def test_cuda_is_taken_where_it_can_run(monkeypatch):
    pretend(monkeypatch, devices=2)
    for device, number in (("auto", 0), ("cuda", 0), ("cuda:1", 1)):
        choice = choose_provider(device, "float16")
        assert (choice.name, choice.device_id) == ("CUDAExecutionProvider", number)
        assert choice.providers[0][1].get("device_id", "0") == str(number)


def test_options_of_a_device_reach_the_provider(monkeypatch):
    pretend(monkeypatch)
    choice = choose_provider("cuda", "bfloat16", CudaOptions(graphs=True, tf32=True, memory_limit=5_000_000))
    assert choice.providers == [
        (
            "CUDAExecutionProvider",
            {
                "arena_extend_strategy": "kSameAsRequested",
                "use_tf32": "1",
                "enable_cuda_graph": "1",
                "gpu_mem_limit": "5000000",
            },
        )
    ]
    with pytest.raises(ValueError, match="memory_limit must be at least 1, got 0"):
        CudaOptions(memory_limit=0)


@pytest.mark.parametrize(
    ("state", "activations", "reason"),
    [
        ({"built": False}, "float16", r"built without CUDA .*melt-onnx\[cuda\]"),
        (
            {"missing": {"libcublas.so.13": "pip install 'melt-onnx[cuda-libraries]'"}},
            "float16",
            r"missing libcublas.so.13 \(from: pip install 'melt-onnx\[cuda-libraries\]'\)",
        ),
        ({"devices": 0}, "float16", "finds no device"),
        ({"driver": 12040}, "float16", "runs CUDA 12.4 at most, this onnxruntime needs 13: update the driver"),
        ({}, "float32", r"was made for cpu \(float32 activations\), not for cuda: .*--activations float16"),
    ],
)
def test_cuda_says_what_it_lacks_and_auto_says_why_it_took_the_cpu(monkeypatch, state, activations, reason):
    pretend(monkeypatch, **state)
    with pytest.raises(ProviderError, match=f"device='cuda' cannot run here: .*{reason}.*; use device='cpu'"):
        choose_provider("cuda", activations)
    choice = choose_provider("auto", activations)
    assert choice.providers == ["CPUExecutionProvider"]
    assert re.search(f"CUDA cannot run here: .*{reason}", choice.reason)


@pytest.mark.parametrize("platform", ["linux", "win32", "darwin"])
def test_nothing_is_said_of_cuda_where_there_never_was_any(monkeypatch, platform):
    """Of what a build lacks for CUDA as little as of a driver."""

    def load(name):
        raise OSError(name)

    pretend(monkeypatch, built=False)
    monkeypatch.setattr(cuda.sys, "platform", platform)
    monkeypatch.setattr(cuda, "_load", load)
    choice = choose_provider("auto", "float32")
    assert (choice.device, choice.reason) == ("cpu", "there is no other device")
    with pytest.raises(ProviderError, match="device='cuda' cannot run here: .*built without CUDA"):
        choose_provider("cuda", "float32")


def test_a_device_that_does_not_exist_is_refused(monkeypatch):
    pretend(monkeypatch, devices=2)
    with pytest.raises(ProviderError, match=r"device='cuda:2' .*device 2 does not exist: there are devices 0 to 1"):
        choose_provider("cuda:2", "float16")


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "cpu:1", "CUDA"])
def test_unknown_devices_are_refused(monkeypatch, device):
    pretend(monkeypatch)
    with pytest.raises(ValueError, match=f"device must be one of cpu, cuda, auto, or cuda:N, got '{device}'"):
        choose_provider(device, "float16")


def test_a_bundle_for_cuda_alone_is_refused_on_the_cpu(monkeypatch):
    pretend(monkeypatch, devices=0)
    command = "melt-export CHECKPOINT --out BUNDLE --precision int4"
    for device in ("cpu", "auto"):
        with pytest.raises(ProviderError, match=rf"made for cuda \(bfloat16 activations\), not for cpu: .*{command}"):
            choose_provider(device, "bfloat16")


def test_a_driver_that_fails_is_named(monkeypatch):
    pretend(monkeypatch)
    monkeypatch.setattr(cuda, "_load", lambda _: SimpleNamespace(cuInit=lambda _: 100))
    assert driver_obstacle(0) == "the NVIDIA driver answers with error 100"


def test_too_little_device_memory_says_what_to_lower(monkeypatch, tiny_bundle):
    choice = SimpleNamespace(device="cuda", device_id=0)
    monkeypatch.setattr(model, "choose_provider", lambda *_: choice)
    monkeypatch.setattr(opening, "free_memory", lambda _: 1_000_000)
    with pytest.raises(ProviderError, match=r"0.00 GB free, 0.00 GB are needed .*lower capacity \(now 500\)"):
        MeltModel.load(tiny_bundle, device="cuda", capacity=500)


@pytest.mark.parametrize("device", ["cpu", "auto"])
def test_a_run_on_the_cpu_says_nothing_of_cuda(tiny_bundle, device):
    """Libraries write past Python, so in a process of its own; a GPU that can be used would be used."""
    if device == "auto" and cuda_obstacle() is None:
        pytest.skip("CUDA can run here")
    command = [sys.executable, "-m", "melt_runtime", "generate", str(tiny_bundle), "Who is Ana?", "--quiet"]
    done = subprocess.run([*command, "--device", device], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert "onnxruntime" not in done.stdout


def test_a_build_without_cuda_misses_no_library(monkeypatch):
    monkeypatch.setattr(cuda.ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    assert missing_libraries() == {}
    assert "built without CUDA" in cuda_obstacle()


def test_doctor_lists_what_is_missing(monkeypatch):
    missing = {"libcudart.so.13": "pip install 'melt-onnx[cuda-libraries]'"}
    pretend(monkeypatch, missing=missing)
    monkeypatch.setattr(doctor, "missing_libraries", lambda: missing)
    report = str(doctor.diagnose())
    assert "device='cuda'     cannot run" in report
    assert "missing libcudart.so.13: pip install 'melt-onnx[cuda-libraries]'" in report


def test_doctor_says_what_keeps_cuda_from_running(monkeypatch):
    pretend(monkeypatch, devices=0)
    monkeypatch.setattr(doctor, "missing_libraries", dict)
    assert "  the NVIDIA driver finds no device" in str(doctor.diagnose())
