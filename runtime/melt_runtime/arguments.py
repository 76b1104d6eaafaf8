"""Checks of what callers give: each raises ``ValueError`` with field, rule and value. Knows nothing of models."""

import os
import reprlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

_MOST_BITS = 256


class _Repr(reprlib.Repr):
    """``repr`` of bounded length that never fails: Python refuses to print the longest integers."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 80
        self.maxlevel = 2  # six elements each: six levels would be 46,656

    def repr1(self, value: object, level: int) -> str:
        """As reprlib does, which takes a type by its name for one of Python's, and then fails where it is another."""
        try:
            return super().repr1(value, level)
        except Exception:
            return f"an object of type {type(value).__name__[:80]}"

    def repr_int(self, value: int, level: int) -> str:
        """As Python prints it, unless it is very long."""
        return repr(value) if value.bit_length() <= _MOST_BITS else f"a number of {value.bit_length()} bits"


def shown(value: object) -> str:
    """``value`` as a message shows it, whatever its length."""
    return _Repr().repr(value)


def shown_name(text: str) -> str:
    """A word in a message as it stands, without quotation marks, unless it is very long or cannot be printed."""
    return shown(str.__str__(text))[1:-1]


def is_whole(value: object) -> bool:
    """Whether ``value`` is an integer, Python's or numpy's; a truth value is none."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool | np.timedelta64)


def whole_number(name: str, value: object, least: int, most: int, why: str = "") -> int:
    """``value`` as an ``int``.

    Args:
        name: of the field.
        value: what was given.
        least: smallest that is taken.
        most: largest that is taken.
        why: said after ``most``.

    Raises:
        ValueError: no whole number, or outside ``[least, most]``.
    """
    if not is_whole(value):
        raise ValueError(f"{name} must be a whole number, got {shown(value)}")
    number = int(value)  # type: ignore[call-overload]
    if number < least:
        raise ValueError(f"{name} must be at least {least}, got {shown(number)}")
    if number > most:
        raise ValueError(f"{name} must be at most {most}{why}, got {shown(number)}")
    return int(number)


def real_number(name: str, value: object, rule: str, holds: Callable[[float], bool]) -> float:
    """``value`` as a ``float``.

    Raises:
        ValueError: no number, or not as ``rule`` says, which ``holds`` decides; NaN never holds.
    """
    if not (is_whole(value) or isinstance(value, float | np.floating)):
        raise ValueError(f"{name} must be a number, {rule}, got {shown(value)}")
    try:
        number = float(value)  # type: ignore[arg-type]
    except OverflowError:
        number = float("inf")
    if not holds(number):
        raise ValueError(f"{name} must be {rule}, got {shown(value)}")
    return number


def instance(name: str, value: object, kind: type | tuple[type, ...], rule: str) -> Any:
    """``value`` itself, where it is of ``kind``.

    Raises:
        ValueError: it is not as ``rule`` says.
    """
    if not isinstance(value, kind):
        raise ValueError(f"{name} must be {rule}, got {shown(value)}")
    return value


def one_of(name: str, value: object, known: Sequence[str], why: str = "") -> str:
    """``value`` as one of ``known``; ``why`` is said after them.

    Raises:
        ValueError: it is none of them.
    """
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}{why}, got {shown(value)}")
    return value


def path_of(name: str, value: object, what: str = "a folder") -> Path:
    """``value`` as the path of ``what``, which need not exist.

    Raises:
        ValueError: no path, or one that no file system takes.
    """
    try:
        text = os.fspath(value)  # type: ignore[call-overload]
    except TypeError:  # what offers a path may give another thing
        text = None
    if not isinstance(text, str):
        raise ValueError(f"{name} must be the path of {what}, got {shown(value)}")
    try:
        taken = b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        taken = False
    if not taken:
        raise ValueError(f"{name} must be a path without null characters and half characters, got {shown(text)}")
    return Path(text)


def output_file(name: str, value: object) -> Path:
    """``value`` as the path of a file that may be written, or replaced where it exists.

    Raises:
        ValueError: no path, one in no folder, or a folder, a link or a device.
    """
    path = path_of(name, value, "a file")
    if os.path.lexists(path) and (path.is_symlink() or not path.is_file()):
        raise ValueError(f"{name} must be a file that may be replaced, got {shown(str(path))}: it is something else")
    if not path.parent.is_dir():
        raise ValueError(f"{name} must lie in a folder that exists, got {shown(str(path))}: make it first")
    return path


def function_or_none(name: str, value: object) -> None:
    """Refuses what can be neither called nor left out.

    Raises:
        ValueError: it is such.
    """
    if value is not None and not callable(value):
        raise ValueError(f"{name} must be callable, got {shown(value)}")
