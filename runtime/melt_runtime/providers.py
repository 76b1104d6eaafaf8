"""Execution providers: which one runs, why, and the sessions it runs in. Knows nothing of language models."""

import ctypes
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Literal

import onnxruntime as ort

from melt_runtime.errors import BundleError, ProviderError

Device = Literal["cpu", "cuda", "auto"]
DEVICES: tuple[Device, ...] = ("cpu", "cuda", "auto")

ORT_TYPES = {
    "float32": "tensor(float)",
    "float16": "tensor(float16)",
    "int8": "tensor(int8)",
    "uint8": "tensor(uint8)",
    "int64": "tensor(int64)",
    "int32": "tensor(int32)",
}
"""What ONNX Runtime calls numpy's types."""

_CUDA = "CUDAExecutionProvider"
_CPU = "CPUExecutionProvider"
# What libonnxruntime_providers_cuda.so links against, and where each comes from.
_CUDA_LIBRARIES = {
    "libcuda.so.1": "the NVIDIA driver",
    "libcudart.so.{major}": "pip install nvidia-cuda-runtime",
    "libcublas.so.{major}": "pip install nvidia-cublas",
    "libcublasLt.so.{major}": "pip install nvidia-cublas",
    "libcurand.so.10": "pip install nvidia-curand",
}


@dataclass(frozen=True)
class ProviderChoice:
    """The provider taken.

    Attributes:
        device: ``cpu`` or ``cuda``.
        reason: why, in one line.
    """

    device: Literal["cpu", "cuda"]
    reason: str

    @property
    def providers(self) -> list[str]:
        """What the sessions are asked to run on."""
        return [_CUDA] if self.device == "cuda" else [_CPU]


def choose_provider(device: Device, dtype: str) -> ProviderChoice:
    """Decides where to run a bundle of some activation type.

    Raises:
        ValueError: ``device`` is none of ``cpu``, ``cuda``, ``auto``.
        ProviderError: ``cuda`` was asked for and cannot run here.
    """
    if device not in DEVICES:
        raise ValueError(f"device must be one of {', '.join(DEVICES)}, got {device!r}")
    if device == "cpu":
        return ProviderChoice("cpu", "device='cpu' was asked for")
    obstacle = cuda_obstacle() or _type_obstacle(dtype)
    if obstacle is None:
        return ProviderChoice("cuda", "the CUDA execution provider can run here")
    if device == "cuda":
        raise ProviderError(f"device='cuda' cannot run here: {obstacle}; use device='cpu', or see: melt doctor")
    return ProviderChoice("cpu", f"CUDA cannot run here: {obstacle}")


def cuda_obstacle() -> str | None:
    """What keeps the CUDA execution provider from running, in one line; None where nothing is known to."""
    if _CUDA not in ort.get_available_providers():
        return "this onnxruntime was built without CUDA (pip uninstall onnxruntime; pip install 'melt-onnx[cuda]')"
    missing = missing_cuda_libraries()
    if missing:
        return "missing " + ", ".join(f"{library} (from: {source})" for library, source in missing.items())
    return _driver_obstacle()


def missing_cuda_libraries() -> dict[str, str]:
    """Shared libraries that the CUDA provider needs and the loader cannot find, with where each comes from.

    Checked on Linux only; elsewhere the answer is empty and opening a session decides. A build without CUDA needs none.
    """
    if sys.platform != "linux" or _CUDA not in ort.get_available_providers():
        return {}
    with redirect_stdout(StringIO()):  # it prints what it cannot find; we say it ourselves
        ort.preload_dlls()
    major = ort.cuda_version.split(".")[0]
    missing = {}
    for pattern, source in _CUDA_LIBRARIES.items():
        library = pattern.format(major=major)
        try:
            ctypes.CDLL(library)
        except OSError:
            missing[library] = source
    return missing


def _driver_obstacle() -> str | None:
    """Asks the driver for a device; the libraries alone prove none."""
    if sys.platform != "linux":
        return None
    driver, count = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(0)
    status = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    if status:
        return f"the NVIDIA driver answers with error {status}"
    return None if count.value else "the NVIDIA driver finds no device"


def _type_obstacle(dtype: str) -> str | None:
    if dtype == "float16":
        return None
    return f"its attention takes float16, the bundle's activations are {dtype}: export it with --precision float16"


def session_options(threads: int | None = None) -> ort.SessionOptions:
    """Options of every session.

    Args:
        threads: threads inside an operator; default: one per physical core.

    Raises:
        ValueError: ``threads`` below 1.
    """
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    # The three graphs alternate within a token; workers that spin after one would take the cores from the next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


def make_session(
    path: Path, choice: ProviderChoice, threads: int | None = None, options: ort.SessionOptions | None = None
) -> ort.InferenceSession:
    """Opens a graph on the chosen provider, and only on it.

    Args:
        path: the graph.
        choice: the provider.
        threads: see ``session_options``.
        options: in place of ``session_options(threads)``.

    Raises:
        BundleError: ONNX Runtime cannot read the graph.
        ProviderError: the session runs on another provider than the one chosen.
    """
    options = session_options(threads) if options is None else options
    if choice.device == "cuda":
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    try:
        session = ort.InferenceSession(path, options, providers=choice.providers)
    except Exception as error:  # ONNX Runtime has no common base class below Exception
        raise BundleError(f"ONNX Runtime cannot load {path.name} on {choice.device}: {error}") from error
    if session.get_providers()[0] != choice.providers[0]:
        raise ProviderError(f"{path.name} was asked to run on {choice.providers[0]}, runs on {session.get_providers()}")
    return session
