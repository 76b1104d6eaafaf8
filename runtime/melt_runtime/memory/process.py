"""Resident memory of this process, as the system counts it."""

import sys
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
