"""Arguments of calls in a conversation, as a chat template reads them."""

import json
from collections.abc import Callable
from decimal import Decimal, DecimalException
from math import isfinite
from typing import Any

from melt_runtime.arguments import shown

_MAX_DIGITS = 4300
"""Maximum number of digits of an integer that Python converts to text and back."""
_MAX_DEPTH = 40
"""Maximum number of nested lists and objects in arguments: a chat template reads them inside a message."""


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
            parsed = DECODER.decode(value) if value.strip() else {}
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
        return {replace_halves(name): _plain(item, rule, depth + 1) for name, item in value.items()}
    if isinstance(value, list):
        return [_plain(item, rule, depth + 1) for item in value]
    if isinstance(value, float) and not isfinite(value):
        raise ValueError(f"{rule}, got {value} in it, which JSON does not have")
    return replace_halves(value) if isinstance(value, str) else value


def replace_halves(text: str) -> str:
    """The text with U+FFFD for each half of a surrogate pair."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


_parse_constant: Callable[[str], Any] = _refuse
DECODER = json.JSONDecoder(parse_float=_number, parse_int=_integer, parse_constant=_parse_constant)
"""Reads JSON as ``parse_arguments`` does."""
