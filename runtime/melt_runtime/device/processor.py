"""What the system says of the processor. Knows nothing of ONNX Runtime."""

from pathlib import Path


def cpuinfo(*fields: str) -> list[str]:
    """Lines of Linux's description that begin with one of ``fields``, a set for each core; elsewhere none."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    return [line for line in lines if line.startswith(fields)]
