"""Memory of this process and this machine, as the system counts it."""

import sys
from contextlib import suppress
from pathlib import Path


def resident_bytes() -> int:
    """Peak resident memory of this process; 0 where the system does not say (Windows)."""
    found = _status("VmHWM:")  # Linux; getrusage counts what the parent held when it started this process
    if found is not None:
        return found
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def current_bytes() -> int:
    """Resident memory of this process now; where the system does not say, its peak."""
    return _status("VmRSS:") or resident_bytes()


def _status(name: str) -> int | None:
    """Bytes by their name in Linux's description of this process."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))
    except (OSError, StopIteration):
        return None


def available_bytes() -> int | None:
    """Bytes that this machine, or this container, can still give without moving others out; None where nobody says.

    Linux says it: the kernel's estimate, and what a control group has left.
    """
    found = []
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        found.append(1024 * int(next(line.split()[1] for line in lines if line.startswith("MemAvailable:"))))
    group = Path("/sys/fs/cgroup")
    with suppress(OSError, ValueError):
        # Pages of files count as used there, though the kernel takes them back.
        statistics = dict(line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
        limit = int((group / "memory.max").read_text(encoding="ascii"))
        used = int((group / "memory.current").read_text(encoding="ascii"))
        found.append(limit - used + int(statistics.get("inactive_file", 0)))
    return min(found, default=None)
