"""What a chat template's work costs, in units, so that no template runs without end or fills the memory.

A unit is worth some ten nanoseconds and at most sixteen bytes. Work is paid for before it is done: what is too dear
never begins. Knows nothing of messages, and of jinja2 only what its values look like.
"""

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

from jinja2.exceptions import SecurityError
from jinja2.runtime import Context
from jinja2.utils import Namespace

READ, WRITE = 6, 2
"""Binary logarithms of the characters that a unit reads (comparing, searching) and writes (copying, escaping)."""
NODE, STEP, CALL = 4, 10, 40
"""Units of looking at a value or running a part of the template; of an item or a turn of a loop; of a call."""
MAX_DEPTH = 100
"""Lists in lists: printing, comparing and hashing recurse over them in C."""
MAX_INT = 1 << 8192
"""Whole numbers beyond it can be neither printed nor computed with in a bounded time."""

_VIEWS: tuple[type, ...] = (type({}.keys()), type({}.values()), type({}.items()))


class Meter:
    """Units left to one rendering."""

    def __init__(self, units: int):
        self.left = units

    def spend(self, units: int) -> None:
        """Pays.

        Raises:
            SecurityError: nothing is left.
        """
        self.left -= units
        if self.left < 0:
            raise SecurityError("it takes more time or memory than a chat template may: does it loop without end?")

    def weigh(self, value: Any, pace: int = READ) -> None:
        """Pays for going through a value to its last character, as often as it stands in itself.

        Args:
            value: anything that a template can hold.
            pace: ``READ`` or ``WRITE``.

        Raises:
            SecurityError: too large, or lists nested deeper than ``MAX_DEPTH``.
        """
        if isinstance(value, str):
            self.spend(1 + (len(value) >> pace))
            return
        pending: list[tuple[Iterable[Any], int]] = [((value,), 0)]
        while pending:
            items, depth = pending.pop()
            if depth > MAX_DEPTH:
                raise SecurityError(f"it nests values deeper than {MAX_DEPTH}")
            units = NODE
            for item in items:
                if isinstance(item, str):
                    units += NODE + (len(item) >> pace)
                elif isinstance(item, int):
                    units += NODE + (item.bit_length() >> pace)
                else:
                    units += NODE
                    inner = _children(item)
                    if inner is not None:
                        pending.append((inner, depth + 1))
            self.spend(units)

    def counted(self, items: Iterable[Any], price: int = STEP) -> Iterator[Any]:
        """The items, each paid for when it is asked for."""
        for item in items:
            self.spend(price)
            yield item


class MeteredContext(Context):
    """A rendering's variables, with its meter."""

    meter: Meter

    def derived(self, locals: dict[str, Any] | None = None) -> "MeteredContext":
        """The context of a block: its own variables, the same meter."""
        made = super().derived(locals)
        assert isinstance(made, MeteredContext)
        made.meter = self.meter
        return made


def _children(value: Any) -> Iterable[Any] | None:
    """What is inside of a container; None for all else, iterators too, which are paid for as they run."""
    if isinstance(value, list | tuple):
        return value
    if isinstance(value, Namespace):
        value = _attributes(value)
    if isinstance(value, dict):
        return chain(value.keys(), value.values())
    views: Any = value
    return views if isinstance(value, _VIEWS) else None


def _attributes(space: Namespace) -> dict[str, Any]:
    """The attributes of a namespace, which hides its dictionary."""
    attributes: dict[str, Any] = object.__getattribute__(space, "_Namespace__attrs")
    return attributes
