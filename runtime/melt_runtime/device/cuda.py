"""What a machine has of CUDA: libraries, driver, devices, memory. Knows nothing of models."""

import ctypes
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from typing import Any

from melt_runtime.arguments import instance, whole_number
from melt_runtime.device.ort import ort

PROVIDER = "CUDAExecutionProvider"
LIBRARIES_EXTRA = "pip install 'melt-onnx[cuda-libraries]'"

# What libonnxruntime_providers_cuda.so links against.
_DRIVER = "libcuda.so.1"
_RUNTIME = "libcudart.so.{major}"
_LIBRARIES = (_DRIVER, _RUNTIME, "libcublas.so.{major}", "libcublasLt.so.{major}", "libcurand.so.10")


@dataclass(frozen=True)
class CudaOptions:
    """How sessions use a CUDA device.

    Attributes:
        graphs: capture a decoded token's loop and head once and replay them. A captured graph holds what the host said
            when it was captured, so attention then always sizes its work for the full capacity: the numbers may differ
            from plain runs in the last bits, and a short context is no faster. Passes over several slots are plain.
        tf32: let float32 products round their inputs to 10 bits. Bundles for CUDA hold float32 in their logits only.
        memory_limit: bytes that one graph's weights and intermediate results may take; default: what ``melt plan``
            says of both, with room.
    """

    graphs: bool = False
    tf32: bool = False
    memory_limit: int | None = None

    def __post_init__(self) -> None:
        """Checks the fields.

        Raises:
            ValueError: a wrong type, or a limit below 1.
        """
        for name in ("graphs", "tf32"):
            instance(name, getattr(self, name), bool, "True or False")
        if self.memory_limit is not None:
            whole_number("memory_limit", self.memory_limit, 1, 2**63 - 1)

    def provider_options(self, device_id: int) -> dict[str, str]:
        """The provider's own options. Its arena grows by what is asked for, not by powers of two."""
        options = {
            "arena_extend_strategy": "kSameAsRequested",
            "use_tf32": str(int(self.tf32)),
            "enable_cuda_graph": str(int(self.graphs)),
        }
        if device_id:
            options["device_id"] = str(device_id)
        if self.memory_limit is not None:
            options["gpu_mem_limit"] = str(self.memory_limit)
        return options


def cuda_obstacle(device_id: int = 0) -> str | None:
    """What keeps a CUDA device from being used, in one line; None where nothing is known to."""
    if PROVIDER not in ort.get_available_providers():
        return "this onnxruntime was built without CUDA (pip uninstall onnxruntime; pip install 'melt-onnx[cuda]')"
    missing = missing_libraries()
    if missing:
        return "missing " + ", ".join(f"{library} (from: {source})" for library, source in missing.items())
    return driver_obstacle(device_id)


def has_driver() -> bool:
    """Whether this machine has an NVIDIA driver; without one nobody expects CUDA of it."""
    name = {"linux": _DRIVER, "win32": "nvcuda.dll"}.get(sys.platform)
    try:
        return name is not None and bool(_load(name))
    except OSError:
        return False


def missing_libraries() -> dict[str, str]:
    """Shared libraries that the CUDA provider needs and the loader cannot find, with where each comes from.

    Checked on Linux only; elsewhere the answer is empty and opening a session decides. A build without CUDA needs none.
    """
    if sys.platform != "linux" or PROVIDER not in ort.get_available_providers():
        return {}
    with redirect_stdout(StringIO()):  # it prints what it cannot find; we say it ourselves
        ort.preload_dlls()
    missing = {}
    for pattern in _LIBRARIES:
        library = pattern.format(major=_major())
        try:
            ctypes.CDLL(library)
        except OSError:
            missing[library] = "the NVIDIA driver" if library == _DRIVER else LIBRARIES_EXTRA
    return missing


def driver_obstacle(device_id: int) -> str | None:
    """Asks the driver for the device and for its own version; the libraries alone prove neither."""
    if sys.platform != "linux":
        return None
    driver, count, version = _load(_DRIVER), ctypes.c_int(0), ctypes.c_int(0)
    status = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    if status:
        return f"the NVIDIA driver answers with error {status}"
    driver.cuDriverGetVersion(ctypes.byref(version))
    if version.value // 1000 < _major():
        found = f"{version.value // 1000}.{version.value % 1000 // 10}"
        return f"the NVIDIA driver runs CUDA {found} at most, this onnxruntime needs {_major()}: update the driver"
    if count.value == 0:
        return "the NVIDIA driver finds no device"
    if device_id >= count.value:
        return f"device {device_id} does not exist: there are devices 0 to {count.value - 1}"
    return None


def free_memory(device_id: int) -> int | None:
    """Bytes of a device's memory that nothing uses; None where the system does not say."""
    if sys.platform != "linux":
        return None
    runtime, free, total = _load(_RUNTIME.format(major=_major())), ctypes.c_size_t(0), ctypes.c_size_t(0)
    if runtime.cudaSetDevice(device_id) or runtime.cudaMemGetInfo(ctypes.byref(free), ctypes.byref(total)):
        return None
    return free.value


def _load(library: str) -> Any:
    return ctypes.CDLL(library)


def _major() -> int:
    """The major version of CUDA that this ONNX Runtime was built for."""
    return int(ort.cuda_version.split(".")[0])
