"""Calls of functions: as a model writes them and as OpenAI's objects."""

import re
import uuid
from dataclasses import dataclass, field
from typing import Any

from melt_runtime.text.call_arguments import DECODER, parse_arguments, replace_halves

_SPACES = re.compile(r"[ \t\n\r]*")


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
        name = DECODER.decode(text[slice(*spans["name"])])
        arguments = text[slice(*spans["arguments"])]
        parse_arguments(arguments)
    except (ValueError, KeyError, RecursionError):
        return None
    if not isinstance(name, str) or not arguments.startswith("{") or replace_halves(name) != name:
        return None
    return Call(name, arguments), end


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
        name, place = DECODER.raw_decode(text, _expect(text, place, '"') - 1)
        start = _skip(text, _expect(text, place, ":"))
        _, place = DECODER.raw_decode(text, start)
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
