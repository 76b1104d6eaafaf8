"""Calls of functions: as a model writes them, as OpenAI's objects, and as a chat template reads them."""

import json
import re
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from decimal import Decimal, DecimalException
from math import isfinite
from typing import Any

from melt_runtime.arguments import shown

_SPACES = re.compile(r"[ \t\n\r]*")
_MAX_DIGITS = 4300
"""Maximum number of digits of an integer that Python converts to text and back."""
_MAX_DEPTH = 40
"""Maximum number of nested lists and objects in arguments: a chat template reads them inside a message."""


@dataclass(frozen=True)
class Call:
    """A call that a model wrote.

    Attributes:
        name: name of the function.
        arguments: JSON object, character by character as the model wrote it.
        id: name of this call, by which its result refers to it.
    """

    name: str
    arguments: str
    id: str = field(default_factory=lambda: f"call_{uuid.uuid4().hex[:24]}")

    @property
    def form(self) -> dict[str, Any]:
        """OpenAI's object."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


def read_call(text: str) -> tuple[Call, int] | None:
    """The call at the beginning of a text, and where it ends; None where there is none.

    A call is a JSON object with a ``name`` that is text and ``arguments`` that ``parse_arguments`` takes.
    """
    try:
        spans, end = _members(text)
        name = _DECODER.decode(text[slice(*spans["name"])])
        arguments = text[slice(*spans["arguments"])]
        parse_arguments(arguments)
    except (ValueError, KeyError, RecursionError):
        return None
    if not isinstance(name, str) or not arguments.startswith("{") or _replace_halves(name) != name:
        return None
    return Call(name, arguments), end


def parse_arguments(value: object) -> dict[str, Any]:
    """A call's arguments as a chat template reads them.

    Empty text means no arguments. Numbers that no float can hold become integers of the same value, those of more than
    4,300 digits their text; halves of surrogate pairs, which no tokenizer takes, become U+FFFD.

    Args:
        value: JSON text, or the object itself, as some clients send it.

    Raises:
        ValueError: not a JSON object; NaN, Infinity, or more than 40 levels in it.
    """
    rule = "must be a JSON object, or its text"
    if isinstance(value, str):
        try:
            parsed = _DECODER.decode(value) if value.strip() else {}
        except RecursionError as error:
            raise ValueError(f"{rule}, of at most {_MAX_DEPTH} levels, got more") from error
        except ValueError as error:
            raise ValueError(f"{rule}, got {shown(value)}: {error}") from error
    else:
        parsed = value
    if parsed is None:
        parsed = {}
    if not isinstance(parsed, dict):
        raise ValueError(f"{rule}, got {shown(value)}")
    made: dict[str, Any] = _plain(parsed, rule, 1)
    return made


def _members(text: str) -> tuple[dict[str, tuple[int, int]], int]:
    """Where each value of the JSON object at the beginning of a text stands, by name, and where the object ends.

    Raises:
        ValueError: no JSON object.
    """
    spans: dict[str, tuple[int, int]] = {}
    place = _expect(text, 0, "{")
    if text[_skip(text, place) :].startswith("}"):
        return spans, _expect(text, place, "}")
    while True:
        name, place = _DECODER.raw_decode(text, _expect(text, place, '"') - 1)
        start = _skip(text, _expect(text, place, ":"))
        _, place = _DECODER.raw_decode(text, start)
        spans[name] = (start, place)
        after = _skip(text, place)
        if text[after : after + 1] != ",":
            return spans, _expect(text, place, "}")
        place = after + 1


def _skip(text: str, place: int) -> int:
    spaces = _SPACES.match(text, place)
    assert spaces is not None  # it may be empty
    return spaces.end()


def _expect(text: str, place: int, mark: str) -> int:
    """The place after ``mark``, which may have spaces before it."""
    place = _skip(text, place)
    if not text.startswith(mark, place):
        raise ValueError(f"{mark} expected at {place}")
    return place + 1


def _number(text: str) -> float | int | str:
    """A number with a point or an exponent; an integer where it exceeds every float, its text where no integer does."""
    if isfinite(float(text)):
        return float(text)
    try:
        number = Decimal(text)
    except DecimalException:  # an exponent of more digits than a Decimal has
        return text
    return int(number) if number.adjusted() < _MAX_DIGITS else text


def _integer(text: str) -> int | str:
    return int(text) if len(text) <= _MAX_DIGITS else text


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _plain(value: Any, rule: str, depth: int) -> Any:
    """A copy without halves of surrogate pairs."""
    if depth > _MAX_DEPTH:
        raise ValueError(f"{rule}, of at most {_MAX_DEPTH} levels, got more")
    if isinstance(value, dict):
        return {_replace_halves(name): _plain(item, rule, depth + 1) for name, item in value.items()}
    if isinstance(value, list):
        return [_plain(item, rule, depth + 1) for item in value]
    if isinstance(value, float) and not isfinite(value):
        raise ValueError(f"{rule}, got {value} in it, which JSON does not have")
    return _replace_halves(value) if isinstance(value, str) else value


def _replace_halves(text: str) -> str:
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


_parse_constant: Callable[[str], Any] = _refuse
_DECODER = json.JSONDecoder(parse_float=_number, parse_int=_integer, parse_constant=_parse_constant)
