"""What an export says while it works: a line for each stage, and on a terminal a bar inside of the long ones."""

import sys
import time
from collections.abc import Iterable, Sequence
from typing import TypeVar

T = TypeVar("T")


class Stages:
    """Writes each stage to standard error as it begins, with the seconds since the first of them."""

    def __init__(self) -> None:
        self._begin = time.monotonic()

    def __call__(self, line: str) -> None:
        """Writes one line."""
        print(f"{time.monotonic() - self._begin:5.0f} s  {line}", file=sys.stderr, flush=True)


def bar(items: Sequence[T], unit: str, what: str = "") -> Iterable[T]:
    """Goes through ``items`` with a bar that disappears when it is done; none where standard error is no terminal."""
    from tqdm import tqdm  # not before it is needed: the command line's help works without

    return tqdm(items, desc=what or None, unit=unit, leave=False, disable=None)
