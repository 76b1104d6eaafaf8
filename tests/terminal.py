"""A program on a terminal of its own: what a person types, what the screen gets. POSIX alone."""

import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from types import TracebackType

PROMPT = b"\x1b[?2004h"
"""What prompt_toolkit writes when it begins to read a line: from here on pastes are marked."""
SECONDS = 240.0
"""Against hangs, whatever else the machine does."""


class Terminal:
    """A ``melt`` command on a new terminal, which is also its controlling one, so that Ctrl-C is a signal.

    Attributes:
        output: everything that it wrote.
    """

    def __init__(self, *arguments: object):
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "melt_runtime", *map(str, arguments)],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=_take_terminal,
            env={**os.environ, "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"},
        )
        os.close(slave)
        self.output = b""
        self._seen = 0

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._master)

    def wait_for(self, wanted: bytes) -> bytes:
        """Reads until ``wanted`` came; returns what came since the last wait, up to its end."""
        self._wait_until(lambda: self.output.find(wanted, self._seen) >= 0, repr(wanted))
        end = self.output.index(wanted, self._seen) + len(wanted)
        since, self._seen = self.output[self._seen : end], end
        return since

    def wait_for_answer(self) -> None:
        """Reads until a text stands on the screen's last line that is not a line of progress."""
        bars = (b"prompt:", b"checking", b"opening", b"making")

        def begun() -> bool:
            last = self.output[self._seen :].rpartition(b"\r")[2].strip()
            return bool(last) and not last.startswith(bars)

        self._wait_until(begun, "answer")

    def send(self, keys: bytes) -> None:
        """Types."""
        os.write(self._master, keys)

    def line(self, text: str) -> None:
        """Types a line where one is asked for."""
        self.wait_for(PROMPT)
        self.send(text.encode() + b"\r")

    def end(self) -> int:
        """Reads what is left; returns the exit status."""
        end = time.monotonic() + SECONDS
        while self._read():
            assert time.monotonic() < end, f"it does not end: {self.output[self._seen :]!r}"
        return self._process.wait(SECONDS)

    def _wait_until(self, holds: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + SECONDS
        while not holds():
            assert time.monotonic() < end, f"no {what} in {self.output[self._seen :]!r}"
            assert self._read(), f"it ended without {what}: {self.output[self._seen :]!r}"

    def _read(self) -> bool:
        if not select.select([self._master], [], [], 0.1)[0]:
            return True
        try:
            piece = os.read(self._master, 1 << 16)
        except OSError:  # how Linux says that nobody holds the other end any more
            return False
        self.output += piece
        return bool(piece)


def _take_terminal() -> None:
    """In the new process: the terminal is its own, and Ctrl-C counts, which a shell's background jobs ignore."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
