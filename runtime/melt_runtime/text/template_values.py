"""What a chat template may do with values: operators, methods, formats, each paid for before it is done.

Results are Python's own.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from jinja2.exceptions import SecurityError
from jinja2.sandbox import SandboxedEnvironment, SandboxedFormatter

from melt_runtime.text.template_meter import MAX_INT, READ, STEP, WRITE, Meter

_MAX_WIDTH = 1000
"""Characters that a number in a template may ask for as padding or indentation."""
_SLOW_SEARCH = 30_000  # longer texts are searched in linear time by CPython
MARKUP_GROWTH = 6
"""Characters that escaping makes of one: `"` becomes `&#34;`."""


def operate(meter: Meter, name: str, left: Any, right: Any) -> Any:
    """A binary operator's result.

    Raises:
        SecurityError: the result would be too large.
    """
    if isinstance(left, int) and isinstance(right, int):
        _require_small(name, left, right)
    elif isinstance(left, str) and name == "%":
        return percent(meter, left, right)
    else:
        count = left if isinstance(left, int) else right if isinstance(right, int) else 1
        size = _size(left) + _size(right)
        meter.spend(1 + (size * (max(count, 1) if name == "*" else 1) >> WRITE))
    return _OPERATORS[name](left, right)


_OPERATORS: dict[str, Callable[[Any, Any], Any]] = SandboxedEnvironment.default_binop_table


def _require_small(name: str, left: int, right: int) -> None:
    bits = left.bit_length() + right.bit_length()
    if name == "**":
        bits = left.bit_length() * max(right, 0)
    if bits > MAX_INT.bit_length():
        raise SecurityError(f"numbers are too large for {name!r}")


def _size(value: Any) -> int:
    """Characters of a copy; a place in a list counts as a unit of them."""
    if isinstance(value, str):
        return len(value) * (MARKUP_GROWTH if hasattr(value, "__html__") else 1)
    return len(value) << WRITE if isinstance(value, list | tuple) else 0


def percent(meter: Meter, text: str, values: Any) -> str:
    """``text % values`` with bounded widths."""
    if text.count("%(") != len(re.findall(r"%\(\w*\)", text)):
        raise SecurityError("keys in a format must be plain words")
    count = widths = 0
    for spec in re.finditer(r"%(?:\(\w*\))?[#0\- +]*(\*|\d+)?(?:\.(\*|\d+)?)?", text):
        count += 1
        for width in spec.groups(default="0"):
            require_width("a format", _MAX_WIDTH + 1 if width == "*" else width)
            widths += int(width)
    meter.spend((len(text) + widths) * (MARKUP_GROWTH if hasattr(text, "__html__") else 1) >> WRITE)
    for _ in range(count if isinstance(values, dict) else 1):  # a key may be named often
        meter.weigh(values, WRITE)
    made: str = text % values
    return made


def require_width(what: str, width: Any) -> int:
    """The width as a number."""
    number = int(width)
    if abs(number) > _MAX_WIDTH:
        raise SecurityError(f"{what} must be at most {_MAX_WIDTH} wide")
    return number


def contains(meter: Meter, group: Any, item: Any) -> bool:
    """``item in group``."""
    if isinstance(group, str):
        pay_search(meter, group, item if isinstance(item, str) else "")
    elif isinstance(group, dict):
        meter.weigh(item)
    elif isinstance(group, range):
        meter.spend(1 if isinstance(item, int) else len(group))
    elif isinstance(group, Iterator):
        return any(_equal(meter, item, other) for other in meter.counted(group))
    else:
        meter.weigh(item)
        meter.weigh(group)
    return item in group


def _equal(meter: Meter, left: Any, right: Any) -> bool:
    meter.weigh(left)
    meter.weigh(right)
    return left is right or bool(left == right)


def pay_search(meter: Meter, text: str, needle: str) -> None:
    """Pays for looking for a text in another."""
    product = len(text) * len(needle) if len(text) < _SLOW_SEARCH else 0
    meter.spend(1 + (len(text) >> READ) + (product >> 8))


_SEARCHES = {"count", "find", "index", "partition", "replace", "rfind", "rindex", "rpartition", "rsplit", "split"}
_STRIPS = {"lstrip", "rstrip", "strip"}
_WIDTHS = {"center", "ljust", "rjust", "zfill"}
_METHODS: dict[type, set[str]] = {
    str: {
        *_SEARCHES,
        *_STRIPS,
        *_WIDTHS,
        *("capitalize", "casefold", "endswith", "isalnum", "isalpha", "isascii", "isdecimal", "isdigit", "islower"),
        *("isnumeric", "isspace", "istitle", "isupper", "join", "lower", "removeprefix", "removesuffix", "splitlines"),
        *("startswith", "swapcase", "title", "upper"),
    },
    dict: {"copy", "get", "items", "keys", "values"},
    list: {"copy", "count", "index"},
    tuple: {"count", "index"},
    float: {"is_integer"},
}


def prepare_method(
    meter: Meter, owner: Any, name: str, arguments: tuple[Any, ...], named: Mapping[str, Any]
) -> tuple[Any, ...]:
    """Pays for a method of a text or a container.

    Returns:
        The arguments by place to call it with: where one is an iterator, it was read.

    Raises:
        SecurityError: a method that is not offered, or too large a result.
    """
    kind = next((kind for kind in _METHODS if isinstance(owner, kind)), type(owner))
    if name not in _METHODS.get(kind, ()):
        raise SecurityError(f"{kind.__name__}.{name} is not offered to chat templates")
    if name == "join" and arguments:
        arguments = (materialized(meter, arguments[0]), *arguments[1:])
        meter.weigh(arguments[0], WRITE)
        meter.spend(_size(owner) * len(arguments[0]) >> WRITE)
    given = [*arguments, *named.values()]
    for argument in given:
        meter.weigh(argument)
    if isinstance(owner, str):
        _pay_text_method(meter, owner, name, given)
    elif name in ("count", "index"):
        meter.weigh(owner)
    elif name == "copy":
        meter.spend(len(owner))
    return arguments


def _pay_text_method(meter: Meter, text: str, name: str, arguments: list[Any]) -> None:
    texts = [argument for argument in arguments if isinstance(argument, str)]
    meter.spend(1 + (_size(text) >> WRITE))
    if name in _SEARCHES and texts:
        pay_search(meter, text, texts[0])
    if name in _STRIPS and texts:
        meter.spend(len(text) * len(texts[0]) >> READ)
    if name in ("split", "rsplit"):
        meter.spend(STEP * (text.count(texts[0]) if texts and texts[0] else len(text) // 2))
    elif name == "splitlines":
        meter.spend(STEP * lines(text))
    elif name == "replace" and len(texts) > 1:
        meter.spend(growth(text, *texts[:2]))
    elif name in _WIDTHS and arguments:
        require_width(name, arguments[0])


def growth(text: str, old: str, new: str) -> int:
    """Units of what replacing adds to a text."""
    return (text.count(old) if old else len(text) + 1) * _size(new) >> WRITE


def lines(text: str) -> int:
    """Lines as ``str.splitlines`` counts them, or some more."""
    return 1 + sum(text.count(mark) for mark in "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029")


def materialized(meter: Meter, items: Any) -> Any:
    """The items of what makes them as it runs; other values as they are."""
    return list(meter.counted(items)) if isinstance(items, Iterator | range) else items


class TextFormat:
    """``text.format``, which takes a meter."""

    def __init__(self, text: str, mapped: bool):
        self._text, self._mapped = text, mapped

    def fill(self, environment: SandboxedEnvironment, meter: Meter, args: Any, kwargs: Any) -> str:
        """The text with its fields filled."""
        if self._mapped:
            args, kwargs = (), args[0]
        return _MeteredFormatter(environment, meter).vformat(self._text, args, kwargs)


class _MeteredFormatter(SandboxedFormatter):
    def __init__(self, environment: SandboxedEnvironment, meter: Meter):
        super().__init__(environment)
        self._meter = meter

    def convert_field(self, value: Any, conversion: Any) -> Any:
        self._meter.weigh(value, WRITE)
        return super().convert_field(value, conversion)

    def format_field(self, value: Any, spec: str) -> str:
        for width in re.findall(r"\d+", spec):
            self._meter.spend(require_width("a format", width))
        text: str = super().format_field(value, spec)
        self._meter.spend(1 + (len(text) >> WRITE))
        return text
