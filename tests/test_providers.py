"""L0: which provider is taken, why, and what is said when it cannot run. The machine's own state plays no part."""

import re

import pytest

from melt_runtime import ProviderError, doctor, providers
from melt_runtime.providers import choose_provider, cuda_obstacle, missing_cuda_libraries


def pretend(monkeypatch, built: bool = True, missing: dict[str, str] | None = None, driver: str | None = None) -> None:
    names = ["CUDAExecutionProvider"] * built + ["CPUExecutionProvider"]
    monkeypatch.setattr(providers.ort, "get_available_providers", lambda: names)
    monkeypatch.setattr(providers, "missing_cuda_libraries", lambda: missing or {})
    monkeypatch.setattr(providers, "_driver_obstacle", lambda: driver)


def test_cpu_is_taken_without_looking_further(monkeypatch):
    monkeypatch.setattr(providers, "cuda_obstacle", lambda: pytest.fail("CUDA was looked at"))
    assert choose_provider("cpu", "float32").device == "cpu"


def test_cuda_is_taken_where_it_can_run(monkeypatch):
    pretend(monkeypatch)
    for device in ("auto", "cuda"):
        assert choose_provider(device, "float16").providers == ["CUDAExecutionProvider"]


@pytest.mark.parametrize(
    ("state", "precision", "reason"),
    [
        ({"built": False}, "float16", r"built without CUDA .*melt-onnx\[cuda\]"),
        (
            {"missing": {"libcublas.so.13": "pip install nvidia-cublas"}},
            "float16",
            r"missing libcublas.so.13 \(from: pip install nvidia-cublas\)",
        ),
        ({"driver": "the NVIDIA driver finds no device"}, "float16", "finds no device"),
        ({}, "float32", "takes float16, the bundle's activations are float32: export it with --precision float16"),
    ],
)
def test_cuda_says_what_it_lacks_and_auto_says_why_it_took_the_cpu(monkeypatch, state, precision, reason):
    pretend(monkeypatch, **state)
    with pytest.raises(ProviderError, match=f"device='cuda' cannot run here: .*{reason}.*; use device='cpu'"):
        choose_provider("cuda", precision)
    choice = choose_provider("auto", precision)
    assert choice.providers == ["CPUExecutionProvider"]
    assert re.search(f"CUDA cannot run here: .*{reason}", choice.reason)


def test_a_build_without_cuda_misses_no_library(monkeypatch):
    monkeypatch.setattr(providers.ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    assert missing_cuda_libraries() == {}
    assert "built without CUDA" in cuda_obstacle()


def test_doctor_lists_what_is_missing(monkeypatch):
    missing = {"libcudart.so.13": "pip install nvidia-cuda-runtime"}
    pretend(monkeypatch, missing=missing)
    monkeypatch.setattr(doctor, "missing_cuda_libraries", lambda: missing)
    report = doctor.diagnose()
    assert "device='cuda'     cannot run" in report
    assert "missing libcudart.so.13: pip install nvidia-cuda-runtime" in report


def test_doctor_says_what_keeps_cuda_from_running(monkeypatch):
    pretend(monkeypatch, driver="the NVIDIA driver finds no device")
    monkeypatch.setattr(doctor, "missing_cuda_libraries", dict)
    assert "  the NVIDIA driver finds no device" in doctor.diagnose()
