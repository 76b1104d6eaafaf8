"""The functions, filters and tests of chat templates: what transformers offers them, each paid for beforehand.

Results are jinja2's and transformers'. What jinja2 has beyond them makes web pages: no chat template needs it.
"""

import json
import operator
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from typing import Any

from jinja2.exceptions import SecurityError, TemplateError
from jinja2.sandbox import safe_range
from jinja2.utils import Cycler, Joiner, Namespace, pass_context

from melt_runtime.text.template_meter import CALL, MAX_INT, STEP, WRITE, Meter, MeteredContext
from melt_runtime.text.template_values import (
    MARKUP_GROWTH,
    contains,
    growth,
    lines,
    materialized,
    operate,
    pay_search,
    percent,
    require_width,
)

_MAX_KEY = 1 << 32  # larger numbers can be chosen to share a hash


def _raise_exception(message: Any) -> Any:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    require_width("strftime_now's format", len(form))
    return datetime.now().strftime(form)


@pass_context
def _dict(context: MeteredContext, *args: Any, **kwargs: Any) -> dict[Any, Any]:
    if len(args) > 1:
        raise TypeError(f"dict expected at most 1 argument, got {len(args)}")
    made = {}
    for source in args:
        if not isinstance(source, dict | list | tuple | Iterator):
            raise TypeError(f"dict takes pairs, got {type(source).__name__}")
        pairs = source.items() if isinstance(source, dict) else source
        for key, value in context.meter.counted(pairs):
            made[key_of(context.meter, key)] = value
    return made | kwargs


class _Space(Namespace):
    """As transformers', refuses names with an underscore in front."""

    def __init__(self, values: dict[Any, Any]):
        super().__init__()
        for name, value in values.items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"a namespace holds no name that begins with an underscore, got {name!r}")
        super().__setitem__(name, value)


@pass_context
def _namespace(context: MeteredContext, *args: Any, **kwargs: Any) -> Namespace:
    return _Space(_dict(context, *args, **kwargs))


def key_of(meter: Meter, key: Any) -> Any:
    """A key that a dictionary may have: texts and small numbers, whose hashes nobody can make equal."""
    if isinstance(key, str):
        meter.weigh(key)
    elif not (key is None or (isinstance(key, int) and abs(key) < _MAX_KEY)):
        raise SecurityError(f"keys must be texts or small whole numbers, got {type(key).__name__}")
    return key


FUNCTIONS: dict[str, Any] = {
    "range": safe_range,
    "dict": _dict,
    "namespace": _namespace,
    "cycler": Cycler,
    "joiner": Joiner,
    "raise_exception": _raise_exception,
    "strftime_now": _strftime_now,
}
"""What transformers offers, but for ``lipsum``."""


_Price = Callable[..., Any]
"""Pays for a filter: meter, value, arguments; returns the value to filter."""


def _light(meter: Meter, value: Any, *_: Any, **__: Any) -> Any:
    return meter.counted(value) if isinstance(value, Iterator) else value


def _written(meter: Meter, value: Any, *_: Any, **__: Any) -> Any:
    meter.weigh(value, WRITE)
    return value


def _by_character(meter: Meter, value: Any, *_: Any, **__: Any) -> Any:
    """What runs over the characters in Python."""
    for _turn in range(8):
        meter.weigh(value, 0)
    return value


def _trimmed(meter: Meter, value: Any, chars: Any = None) -> Any:
    for _turn in range(1 + (len(chars) >> WRITE if isinstance(chars, str) else 0)):
        meter.weigh(value, WRITE)
    return value


def _by_item(meter: Meter, value: Any, *args: Any, **kwargs: Any) -> Any:
    given = [*args, *kwargs.values()]
    for argument in given:
        meter.weigh(argument)
    price = STEP + sum(len(argument) for argument in given if isinstance(argument, str))
    meter.spend(STEP * sum(abs(argument) for argument in given if isinstance(argument, int)))
    if isinstance(value, Iterator):
        return meter.counted(value, price)
    if hasattr(value, "__len__"):
        meter.spend(price * len(value))
    return value


def _compared(meter: Meter, value: Any, *args: Any, **kwargs: Any) -> Any:
    """Sorting, and finding equals: every item is compared with some others."""
    value = materialized(meter, _by_item(meter, value, *args, **kwargs))
    if hasattr(value, "__len__"):
        for _ in range(1 + len(value).bit_length()):
            meter.weigh(value, WRITE)
    return value


def _unique(meter: Meter, value: Any, *args: Any, **kwargs: Any) -> Any:
    value = _compared(meter, value, *args, **kwargs)
    if hasattr(value, "__len__"):
        meter.spend(len(value) ** 2 >> 4)  # hashes that were chosen to be equal
    return value


def _joined(meter: Meter, value: Any, d: Any = "", *_: Any, **__: Any) -> Any:
    value = materialized(meter, value)
    meter.weigh(value, 0 if isinstance(value, str) else WRITE)
    meter.spend(len(str(d)) * (len(value) if hasattr(value, "__len__") else 0) >> WRITE)
    return value


def _replaced(meter: Meter, s: Any, old: Any, new: Any, *_: Any, **__: Any) -> Any:
    text, old, new = str(_written(meter, s)), str(_written(meter, old)), str(_written(meter, new))
    pay_search(meter, text, old)
    meter.spend(MARKUP_GROWTH * growth(text, old, new))
    return s


def _indented(meter: Meter, s: Any, width: Any = 4, *_: Any, **__: Any) -> Any:
    text = str(_written(meter, s))
    width = require_width("indent", len(width) if isinstance(width, str) else width)
    meter.spend(lines(text) * max(width, 0) >> WRITE)
    return s


def _centered(meter: Meter, value: Any, width: Any = 80) -> Any:
    require_width("center", width)
    return _written(meter, value)


def _rounded(meter: Meter, value: Any, precision: Any = 0, *_: Any, **__: Any) -> Any:
    require_width("round", precision)
    return _written(meter, value)


_PRICES: dict[str, _Price] = {
    **dict.fromkeys(("abs", "attr", "count", "d", "default", "first", "items", "last", "length", "safe"), _light),
    **dict.fromkeys(("capitalize", "e", "escape", "float", "forceescape", "int", "lower"), _written),
    **dict.fromkeys(("string", "truncate", "upper"), _written),
    **dict.fromkeys(("title", "urlencode", "wordcount"), _by_character),
    "trim": _trimmed,
    **dict.fromkeys(("batch", "list", "map", "reject", "rejectattr", "reverse", "select", "selectattr"), _by_item),
    "slice": _by_item,
    **dict.fromkeys(("dictsort", "groupby", "max", "min", "sort"), _compared),
    "unique": _unique,
    "join": _joined,
    "replace": _replaced,
    "indent": _indented,
    "center": _centered,
    "round": _rounded,
}


def _filter(name: str, price: _Price) -> Callable[..., Any]:
    @pass_context
    def run(context: MeteredContext, value: Any, *args: Any, **kwargs: Any) -> Any:
        context.meter.spend(CALL)
        value = price(context.meter, value, *args, **kwargs)
        made = context.environment.call_filter(hidden(name), value, args, kwargs, context)
        if isinstance(made, int) and abs(made) > MAX_INT:
            raise SecurityError(f"numbers are too large for {name!r}")
        return made

    return run


@pass_context
def _format(context: MeteredContext, value: Any, *args: Any, **kwargs: Any) -> str:
    if args and kwargs:
        raise TypeError("format takes arguments by place or by name, not both")
    return percent(context.meter, value if isinstance(value, str) else str(value), kwargs or args)


@pass_context
def _sum(context: MeteredContext, iterable: Any, attribute: Any = None, start: Any = 0) -> Any:
    if attribute is not None:
        iterable = context.environment.call_filter("map", iterable, (), {"attribute": attribute}, context)
    for item in context.meter.counted(iterable):
        start = operate(context.meter, "+", start, item)
    return start


@pass_context
def _tojson(
    context: MeteredContext,
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: Sequence[str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as transformers writes it, not made safe for HTML."""
    meter = context.meter
    meter.weigh(value, 0)
    options: dict[str, Any] = {"ensure_ascii": ensure_ascii, "indent": indent, "sort_keys": sort_keys}
    if indent is None and separators is None:
        return json.dumps(value, **options)
    for text in (indent or "", *(separators or ())):
        require_width("tojson", len(text) if isinstance(text, str) else text)
    pieces = []
    for piece in json.JSONEncoder(**options, separators=separators).iterencode(value):  # type: ignore[arg-type]
        meter.spend(1 + (len(piece) >> WRITE))
        pieces.append(piece)
    return "".join(pieces)


def _test(compare: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    @pass_context
    def run(context: MeteredContext, value: Any, other: Any) -> Any:
        context.meter.weigh(value)
        context.meter.weigh(other)
        return compare(value, other)

    return run


@pass_context
def _is_in(context: MeteredContext, value: Any, seq: Any) -> bool:
    return contains(context.meter, seq, value)


_COMPARISONS: dict[Callable[[Any, Any], Any], tuple[str, ...]] = {
    operator.eq: ("==", "eq", "equalto"),
    operator.ne: ("!=", "ne"),
    operator.gt: (">", "gt", "greaterthan"),
    operator.ge: (">=", "ge"),
    operator.lt: ("<", "lt", "lessthan"),
    operator.le: ("<=", "le"),
}


def hidden(name: str) -> str:
    """The name under which jinja2's own filter is kept; no template can write it."""
    return f" {name}"


def offered_filters(own: dict[str, Any]) -> dict[str, Any]:
    """Filters by name, of those that jinja2 has (``own``)."""
    metered = {name: _filter(name, price) for name, price in _PRICES.items()}
    originals = {hidden(name): own[name] for name in _PRICES}
    return originals | metered | {"format": _format, "sum": _sum, "tojson": _tojson}


def offered_tests(own: dict[str, Any]) -> dict[str, Any]:
    """Tests by name, of those that jinja2 has (``own``): those that compare are paid for."""
    compared = {name: _test(compare) for compare, names in _COMPARISONS.items() for name in names}
    return own | compared | {"in": _is_in}
