"""Files with a JSON object on each line, in UTF-8, from anybody: read line by line, every fault named by its line."""

import io
import json
from collections.abc import Iterator
from itertools import count
from typing import Any, BinaryIO

from melt_runtime.arguments import is_whole, shown

Id = str | int
"""What a line is called; 1 and "1" are two."""
BOM = b"\xef\xbb\xbf"
"""Byte order mark with which some editors begin a file in UTF-8."""
_MOST_BYTES = 1 << 24  # of one line: a file without any is refused before it fills the memory
_SHOWN_FAULTS = 8
_MOST_SHOWN = 600  # characters of one


def one_line(error: Exception) -> str:
    """What an error says, whatever text of a file is in it: on one line, of bounded length, nothing but characters."""
    text = str(error)
    shown_text = text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in shown_text)


class Faults:
    """What is wrong with which lines: the first few in words, and how many."""

    def __init__(self, name: str):
        self._name = name
        self._shown: list[str] = []
        self._count = 0

    def add(self, number: int, error: ValueError) -> None:
        """Notes what is wrong with a line."""
        self._count += 1
        if self._count <= _SHOWN_FAULTS:
            self._shown.append(f"line {number}: {one_line(error)}")

    def raise_any(self, what: str) -> None:
        """Says ``what`` is the matter with the lines that were noted.

        Raises:
            ValueError: there is one.
        """
        if self._count:
            more = [f"and {self._count - _SHOWN_FAULTS} more"] if self._count > _SHOWN_FAULTS else []
            raise ValueError("\n  ".join([f"{self._name} has lines that {what}", *self._shown, *more]))


def read_lines(file: BinaryIO | io.BufferedReader, name: str) -> Iterator[tuple[int, bytes]]:
    """Numbers, from 1, and lines with their ends.

    Args:
        file: at its beginning.
        name: of the file, for messages.

    Raises:
        ValueError: a line is too long to be one.
    """
    for number in count(1):
        line = file.readline(_MOST_BYTES + 1)
        if not line:
            return
        if len(line) > _MOST_BYTES:
            raise ValueError(f"{name} has a line that is too long: line {number} must be at most {_MOST_BYTES} bytes")
        yield number, line


def parse_object(line: bytes) -> dict[str, Any]:
    """The JSON object on a line.

    Raises:
        ValueError: there is none, or not in UTF-8.
    """
    try:
        text = line.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"must be UTF-8, got the byte 0x{line[error.start]:02x} after {error.start} bytes") from None
    try:
        values = json.loads(text, object_pairs_hook=_once_each, parse_constant=_refuse_constant)
        if "\\u" in text:  # how half a character gets into UTF-8
            json.dumps(values, ensure_ascii=False).encode("utf-8")
    except json.JSONDecodeError as error:
        found = f"{error.msg} at character {error.pos + 1}"
        raise ValueError(f"must be a JSON object, got {shown(text)}: {found}") from None
    except UnicodeEncodeError as error:
        half = f"U+{ord(error.object[error.start]):04X}"
        raise ValueError(f"must hold whole characters, got the half character {half} in {shown(text)}") from None
    except RecursionError:
        raise ValueError(f"must be a JSON object of few levels, got {shown(text)}: it nests too deep") from None
    except ValueError as error:
        raise ValueError(f"must be a JSON object, got {shown(text)}: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"must be a JSON object, got {shown(values)}")
    return values


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise ValueError(f"it has the name {shown(name)} twice")
        values[name] = value
    return values


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def require_id(id: object) -> None:
    """Refuses what does not name a line.

    Raises:
        ValueError: it is none, or neither a string nor a whole number.
    """
    if id is None:
        raise ValueError("id is missing: give each line a string or a whole number")
    if not isinstance(id, str) and not is_whole(id):
        raise ValueError(f"id must be a string or a whole number, got {shown(id)}")
