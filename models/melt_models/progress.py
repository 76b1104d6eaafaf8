"""Long work shows itself: a bar on a terminal, a line now and then in a log, nothing in a pipe."""

import os
import stat
import sys
import time
from types import TracebackType

LINE_SECONDS = 30.0
"""Between two lines in a log."""


def writes_bars() -> bool:
    """Whether standard error is a terminal."""
    return sys.stderr.isatty()


def writes_lines() -> bool:
    """Whether standard error is a file, as ``2> log`` makes it."""
    try:
        return stat.S_ISREG(os.fstat(sys.stderr.fileno()).st_mode)
    except (OSError, ValueError):  # an object in place of a file
        return False


class Progress:
    """Steps of one piece of work; used with ``with``."""

    def __init__(
        self, title: str, total: int, unit: str, done: int = 0, draws_bar: bool = True, is_silent: bool = False
    ):
        """Begins.

        Args:
            title: what is done.
            total: steps of the whole.
            unit: one of them.
            done: steps that were taken before.
            draws_bar: False where a library draws a bar of its own.
            is_silent: shows nothing anywhere.
        """
        self.title, self.total, self.unit, self.done = title, total, unit, done
        self._started = self._shown = time.monotonic()
        self._bar, self._note = None, ""
        self._writes = not is_silent and writes_lines()
        if draws_bar and not is_silent and writes_bars():
            from tqdm import tqdm

            self._bar = tqdm(desc=title, total=total, initial=done, unit=unit, mininterval=0.5)

    def __enter__(self) -> "Progress":
        """The work itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Closes the bar; the last line of a log says where work ended well."""
        if self._bar is not None:
            self._bar.close()
        elif self._writes and kind is None:
            self._write()

    def advance(self, steps: int = 1, title: str | None = None, note: str = "") -> None:
        """Counts steps.

        Args:
            steps: that were taken.
            title: what is done now, where it changed.
            note: numbers to show.
        """
        self.done += steps
        self.title, self._note = title or self.title, note
        if self._bar is not None:
            self._bar.set_description(self.title, refresh=False)
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(steps)
        elif self._writes and time.monotonic() - self._shown >= LINE_SECONDS:
            self._shown = time.monotonic()
            self._write()

    def _write(self) -> None:
        seconds = time.monotonic() - self._started
        words = (f"{self.title}: {self.done} of {self.total} {self.unit}s", self._note, f"{seconds:.0f} s")
        print(", ".join(filter(None, words)), file=sys.stderr, flush=True)
