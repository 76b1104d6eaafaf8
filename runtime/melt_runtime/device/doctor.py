"""Says what this machine can run: versions, execution providers, what a CUDA run would lack, and what leaves it."""

import importlib.metadata
import platform

from melt_runtime.device.cuda import cuda_obstacle, missing_libraries
from melt_runtime.device.integers import instructions, overflows
from melt_runtime.device.ort import TELEMETRY, ort

_PACKAGES = ("melt-onnx", "onnxruntime", "onnxruntime-gpu", "numpy", "tokenizers", "jinja2")


def diagnose() -> str:
    """The report, several lines of text."""
    lines = [f"python            {platform.python_version()} on {platform.system()} {platform.machine()}"]
    for package in _PACKAGES:
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            version = "not installed"
        lines.append(f"{package:<17} {version}")
    lines.append(f"built for         {', '.join(ort.get_available_providers())}")
    lines.append("device='cpu'      can run")
    lines.append(f"  8-bit products: {', '.join(instructions()) or 'instructions unknown'}; {_exactness()}")
    obstacle = cuda_obstacle()
    lines.append(f"device='cuda'     {'can run' if obstacle is None else 'cannot run'}")
    missing = missing_libraries()
    lines += [f"  missing {library}: {source}" for library, source in missing.items()]
    if obstacle is not None and not missing:
        lines.append(f"  {obstacle}")
    lines.append(f"privacy           {_privacy()}")
    return "\n".join(lines)


def _privacy() -> str:
    if TELEMETRY == "off":
        return "nothing leaves this machine: the runtime calls no server, ONNX Runtime's telemetry is off"
    return f"the runtime calls no server, but ONNX Runtime's telemetry is {TELEMETRY}"


def _exactness() -> str:
    if overflows():
        return "ONNX Runtime's fast kernels overflow here, its exact ones are used"
    return "exact"
