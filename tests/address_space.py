"""Address space of a process (Linux): what it asked for; what of it is resident depends on the other processes too."""

from pathlib import Path


def mapped_bytes(name: str = "VmData", pid: int | str = "self") -> int:
    """``VmData``: private and writable, now; ``VmSize``: all of it, now; ``VmPeak``: the most so far."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
