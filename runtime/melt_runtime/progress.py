"""Long work shows itself: one line on a terminal, which disappears when the work is done; nothing anywhere else."""

import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self, TextIO

Report = Callable[[str, int, int], None]
"""Told of long work as it goes on: what is done now, how much of it is done, and all of it; 0 where nobody knows."""

Progress = Callable[[int, int], None]
"""Called after every chunk of a prompt with the tokens that are done and all of them."""

PROMPT_DELAY = 0.5
"""Seconds after which the run of a prompt shows itself."""


class Line:
    """A ``Report`` on standard error, where that is a terminal; used with ``with``."""

    def __init__(self, unit: str, delay: float = 0.0):
        """Shows nothing yet.

        Args:
            unit: what is counted; ``B`` is scaled to kB, MB, GB.
            delay: seconds of work before it shows.
        """
        self._unit, self._delay = unit, delay
        self._draws = sys.stderr.isatty()
        self._what = ""
        self._bar: Any = None

    def __enter__(self) -> Self:
        """The line itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Takes the line away."""
        self._close()

    def __call__(self, what: str, done: int, total: int, note: str = "") -> None:
        """Shows how far the work is, and beside it a note."""
        if not self._draws:
            return
        if self._bar is None or what != self._what:
            self._close()
            self._what, self._bar = what, self._open(what, done, total)
        if note:
            self._bar.set_postfix_str(note, refresh=False)
        self._bar.update(done - self._bar.n)

    def prompt(self, done: int, total: int) -> None:
        """The same, in the form in which the run of a prompt is told of."""
        self("prompt", done, total)
        if done == total:
            self._close()  # the answer's text comes next

    def print(self, text: str, file: TextIO | None = None) -> None:
        """Prints above the line, to standard output where no file is given."""
        if self._bar is not None:
            self._bar.clear()
        print(text, file=file, flush=True)
        if self._bar is not None:
            self._bar.refresh()

    def _open(self, what: str, done: int, total: int) -> Any:
        from tqdm import tqdm  # here: most runs need none

        form = None if total else "{desc} ..."
        scaled = self._unit == "B"
        return tqdm(
            initial=done,
            desc=what,
            total=total,
            unit=self._unit,
            unit_scale=scaled,
            leave=False,
            delay=self._delay,
            bar_format=form,
        )

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
