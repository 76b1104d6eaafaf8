"""Damage to JSON values and to bytes, chosen at random: the same seed gives the same damage."""

import copy
import json
import random
from typing import Any

ODD_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 255, 256, 2**15, 2**31 - 1, 2**31, 2**32, 2**53, 2**63, 2**64, 10**300),
    *(0.0, -0.0, 0.5, 1.0, 1.5, 1e-38, 1e308, float("inf"), float("-inf"), float("nan")),
    *("", " ", "0", "1", "x", "null", "../x", "/etc/passwd", "a\0b", "\ud800", "\U0001f600" * 50, "n" * 5000),
    *("float16", "int4", "cpu", "cuda", "loop", "shared", "per_loop", "none", "mean", "last", "elementwise"),
    *([], {}, [[]], [None], {"": None}, [1] * 300, {"a": {"b": {"c": []}}}, [[["deep"]]]),
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value in a JSON value, but its own."""
    found = []
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        found += [(*path, key), *places(value[key], (*path, key))]
    return found


def edit_json(values: Any, chance: random.Random, within: tuple[Any, ...] = ()) -> str:
    """Changes one value somewhere in a JSON object, in place; says which."""
    found = [path for path in places(values) if path[: len(within)] == within and len(path) > len(within)]
    if not found:
        return "nothing"
    # First a depth, so that the many numbers of a vocabulary do not hide the few settings above them.
    depth = chance.choice(sorted({len(path) for path in found}))
    path = chance.choice([path for path in found if len(path) == depth])
    holder = values
    for key in path[:-1]:
        holder = holder[key]
    key, how = path[-1], chance.choice(("replace", "replace", "near", "near", "delete", "add", "rename", "swap"))
    if how == "delete":
        del holder[key]
    elif how == "add" and isinstance(holder, dict):
        holder[chance.choice(("extra", "", "n" * 5000, "../x", "\ud800", key + "x"))] = _odd(chance)
    elif how == "add":
        holder.insert(key, _odd(chance))
    elif how == "rename" and isinstance(holder, dict):
        holder[key + chance.choice(("", " ", "x", "\0"))] = holder.pop(key)
    elif how == "swap":
        other = chance.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
        holder[key], holder[other] = holder[other], holder[key]
    elif how == "near":
        holder[key] = _near(holder[key], chance)
    else:
        holder[key] = _odd(chance)
    return f"{how} {'.'.join(map(str, path))[:80]!r}"


def _odd(chance: random.Random) -> Any:
    return copy.deepcopy(chance.choice(ODD_VALUES))  # else an edit inside one would reach into the next case


def _near(value: Any, chance: random.Random) -> Any:
    """A value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return chance.choice((value + 1, value - 1, 2 * value, value // 2, -value, value + 2**31, 10 * value))
    if isinstance(value, float):
        return chance.choice((-value, 2 * value, value * 1e6, value + 1, 0.0))
    if isinstance(value, str):
        return chance.choice((value.upper(), value[1:], value[:-1], value + "x", value * 40, value[::-1]))
    if isinstance(value, list):
        return chance.choice((value[1:], value[::-1], value * 2, [value], value[:1]))
    if isinstance(value, dict):
        return chance.choice((list(value), dict(list(value.items())[1:]), {**value, "extra": 1}))
    return 0


def edit_text(content: bytes, chance: random.Random) -> tuple[bytes, str]:
    """Damages the bytes of a JSON file as an editor, a disk or a stranger would."""
    how = chance.choice(("bytes", "cut", "deep", "twice", "literal", "encoding", "empty", "huge", "number"))
    place = chance.randrange(len(content) + 1)
    if how == "bytes":
        return edit_bytes(content, chance)
    made = {
        "cut": content[:place],
        "deep": b'{"a": ' + b"[" * chance.choice((150, 1000, 20_000, 200_000)) + content,
        "twice": content.replace(b"{", b"{" + content.strip()[1:40].split(b",")[0] + b", ", 1),
        "literal": content.replace(b": ", chance.choice((b": NaN, ", b": -Infinity; ", b": 1e400, ")), 1),
        "encoding": content[:place] + b"\xff\xfe\xed\xa0\x80" + content[place:],
        "empty": chance.choice((b"", b" ", b"null", b"[]", b"{}", b"0", b'"text"')),
        "huge": content[:1] + b" " * (20 << 20) + content[1:],
        "number": content.replace(b": 1", b": 1" + b"0" * chance.choice((30, 400, 5000)), 1),
    }
    return made[how], how


def edit_bytes(content: bytes, chance: random.Random) -> tuple[bytes, str]:
    """Damages any bytes."""
    how = chance.choice(("flip", "flip", "flip", "cut", "insert", "zero", "ones", "shuffle"))
    changed, place = bytearray(content), chance.randrange(max(1, len(content)))
    length = min(len(content) - place, chance.choice((1, 4, 100, 10_000)))
    if how == "flip":
        for _ in range(chance.choice((1, 1, 3, 30))):
            changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    elif how == "cut":
        del changed[place : chance.choice((place + length, len(changed)))]
    elif how == "insert":
        changed[place:place] = chance.randbytes(length + 1)
    else:
        middle = {"zero": bytes(length), "ones": b"\xff" * length, "shuffle": chance.randbytes(length)}[how]
        changed[place : place + length] = middle
    return bytes(changed), how


def as_text(values: Any) -> bytes:
    """A JSON value with everything that Python's writer allows, lone surrogates included."""
    return json.dumps(values).encode()
