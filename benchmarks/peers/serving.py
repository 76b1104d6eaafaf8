"""A runtime in a process of its own, asked line by line (see worker.py)."""

import json
import statistics
import subprocess
import time
from pathlib import Path

WORKER = Path(__file__).parent / "worker.py"


def spread(ratios: list[float]) -> str:
    """Median, and in brackets the range."""
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"


class Worker:
    """A process that says ``ready`` and then answers each line with a list of numbers as JSON.

    Attributes:
        load_seconds: from its start until it was ready.
    """

    def __init__(self, command: list[str], cwd: Path | None = None):
        begin, pipe = time.perf_counter(), subprocess.PIPE
        self.process = subprocess.Popen(command, cwd=cwd, stdin=pipe, stdout=pipe, stderr=None, text=True)
        if self.process.stdout.readline().strip() != "ready":
            raise RuntimeError(f"could not load its model, see its message above: {' '.join(command)}")
        self.load_seconds = time.perf_counter() - begin

    def ask(self, line: str) -> float:
        """The median of the answer: milliseconds of decoded tokens or of a prompt, or bytes."""
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return statistics.median(json.loads(self.process.stdout.readline()))

    def close(self) -> None:
        """Ends the process."""
        self.process.stdin.close()
        self.process.wait()
