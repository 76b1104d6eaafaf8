"""Says what this machine can run: versions, execution providers, what a CUDA run would lack, and what leaves it."""

import importlib.metadata
import platform
from dataclasses import dataclass

from melt_runtime.device.cuda import cuda_obstacle, missing_libraries
from melt_runtime.device.integers import instructions, overflows
from melt_runtime.device.ort import TELEMETRY, ort

_PACKAGES = ("melt-onnx", "onnxruntime", "onnxruntime-gpu", "numpy", "tokenizers", "jinja2")


@dataclass(frozen=True)
class Diagnosis:
    """What was found.

    Attributes:
        python: its version.
        machine: the system and the processor's architecture.
        packages: versions; None: not installed.
        providers: execution providers that ONNX Runtime was built with.
        instructions: of the processor for products of 8 bits.
        overflows: whether ONNX Runtime's fast kernels overflow here, so that its exact ones are used.
        cuda_obstacle: why CUDA cannot run; None where it can.
        missing_libraries: that CUDA would need, with where each comes from.
        telemetry: of ONNX Runtime: ``off``, or why it is on.
    """

    python: str
    machine: str
    packages: dict[str, str | None]
    providers: list[str]
    instructions: list[str]
    overflows: bool
    cuda_obstacle: str | None
    missing_libraries: dict[str, str]
    telemetry: str

    def __str__(self) -> str:
        """For people, several lines."""
        lines = [f"python            {self.python} on {self.machine}"]
        lines += [f"{package:<17} {version or 'not installed'}" for package, version in self.packages.items()]
        lines.append(f"built for         {', '.join(self.providers)}")
        lines.append("device='cpu'      can run")
        exactness = "ONNX Runtime's fast kernels overflow here, its exact ones are used" if self.overflows else "exact"
        lines.append(f"  8-bit products: {', '.join(self.instructions) or 'instructions unknown'}; {exactness}")
        lines.append(f"device='cuda'     {'can run' if self.cuda_obstacle is None else 'cannot run'}")
        lines += [f"  missing {library}: {source}" for library, source in self.missing_libraries.items()]
        if self.cuda_obstacle is not None and not self.missing_libraries:
            lines.append(f"  {self.cuda_obstacle}")
        calls = "the runtime calls no server"
        lines.append(
            f"privacy           nothing leaves this machine: {calls}, ONNX Runtime's telemetry is off"
            if self.telemetry == "off"
            else f"privacy           {calls}, but ONNX Runtime's telemetry is {self.telemetry}"
        )
        return "\n".join(lines)


def diagnose() -> Diagnosis:
    """Looks at this machine."""
    return Diagnosis(
        python=platform.python_version(),
        machine=f"{platform.system()} {platform.machine()}",
        packages={package: _version(package) for package in _PACKAGES},
        providers=ort.get_available_providers(),
        instructions=[*instructions()],
        overflows=overflows(),
        cuda_obstacle=cuda_obstacle(),
        missing_libraries=missing_libraries(),
        telemetry=TELEMETRY,
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
