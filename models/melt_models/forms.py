"""JSON files of strangers: read, held against a form, every fault a sentence. Knows nothing of models.

A form is a ``TypedDict`` whose types carry their ranges; pydantic checks it strictly: a number is never taken for a
text, nor a truth value for a number.
"""

import os
import re
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic_core import from_json

STRICT = ConfigDict(strict=True, allow_inf_nan=False)
"""For ``with_config`` of a form."""

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 60
_WORDS = (
    (r"^(Input|List|Dictionary|String) should", "must"),
    (r" after validation, not \d+$", ""),
    (r"greater than or equal to", "at least"),
    (r"less than or equal to", "at most"),
    (r"^Extra inputs are not permitted$", "must not be there"),
)
"""pydantic's words for a rule, and this project's."""


def shown(value: Any) -> str:
    """A value of a file in a message, not at its full length."""
    return _REPR.repr(value)


def is_there(path: Path, faults: list[str], missing: str = "") -> bool:
    """Whether there is such a file.

    Args:
        path: the file.
        faults: is added to where another thing has its name: reading that could fail, or wait without end.
        missing: the fault where nothing has; default: none, the file may be absent.
    """
    if path.is_file():
        return True
    if os.path.lexists(path):
        faults.append(f"{path.name} must be a file, got {_kind(path)}: put the file in its place")
    elif missing:
        faults.append(missing)
    return False


def _kind(path: Path) -> str:
    if path.is_dir():
        return "a folder"
    return "a link to nothing" if path.is_symlink() and not path.exists() else "a pipe or a device"


def read_text(path: Path, faults: list[str]) -> str | None:
    """A text file in UTF-8; None, and a fault more, where it is none."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        faults.append(f"{path.name} is not UTF-8: {error.reason} at byte {error.start}")
    except OSError as error:
        faults.append(f"{path.name} cannot be read: {error.strerror}")
    return None


def parse_json(text: str | bytes, where: str, faults: list[str]) -> dict[str, Any] | None:
    """A JSON object; None, and a fault more, where it is none. Deep nesting and lone surrogates are no JSON here."""
    try:
        values = from_json(text)
    except ValueError as error:
        faults.append(f"{where} is not JSON: {error}")
        return None
    if isinstance(values, dict):
        return values
    faults.append(f"{where} must hold a JSON object, got {shown(values)}")
    return None


def read_json(path: Path, faults: list[str]) -> dict[str, Any] | None:
    """A file that holds one JSON object; None, and a fault more, where it does not."""
    try:
        return parse_json(path.read_bytes(), path.name, faults)
    except OSError as error:
        faults.append(f"{path.name} cannot be read: {error.strerror}")
        return None


def fitting(form: TypeAdapter[Any], values: Mapping[str, Any], where: str, faults: list[str]) -> dict[str, Any]:
    """The values that fit a form, each other one a fault more.

    Args:
        form: of a ``TypedDict``; keys that it does not know are left alone.
        values: an object of a file.
        where: its name in messages.
        faults: is added to.
    """
    wrong = set()
    try:
        form.validate_python(values)
    except ValidationError as error:
        for fault in error.errors(include_url=False):
            wrong.add(fault["loc"][0])
            faults.append(f"{where}: {_sentence(fault)}")
    return {name: value for name, value in values.items() if name not in wrong}


def _sentence(fault: Any) -> str:
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in fault["loc"]).lstrip(".")
    if fault["type"] == "missing":
        return f"{path} is missing"
    rule = fault["msg"]
    for theirs, ours in _WORDS:
        rule = re.sub(theirs, ours, rule)
    return f"{path} {rule}, got {shown(fault['input'])}"
