"""JSON schemas as generators write them, made into what llguidance can enforce."""

import json
import math
import re
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

JSON_OPTIONS = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "coerce_one_of": True,
}
"""llguidance's options. JSON comes on one line, as models have read most of it: a small one that may write spaces for
ever does so. ``oneOf`` is ``anyOf``, which is the same where no value fits two branches."""
FORMATS = frozenset({"date-time", "date", "time", "duration", "email", "hostname", "ipv4", "ipv6", "uri", "uuid"})
"""Formats of strings that are enforced; all others are annotations."""
_UNENFORCED = frozenset(
    {
        *("uniqueItems", "propertyNames", "contains", "minContains", "maxContains", "not", "if", "then", "else"),
        *("dependencies", "dependentRequired", "dependentSchemas", "unevaluatedItems", "unevaluatedProperties"),
        *("$dynamicRef", "$recursiveRef"),
    }
)
_ASK_NOTHING: dict[str, tuple[Any, ...]] = {
    "uniqueItems": (False,),
    "propertyNames": (True, {}, {"type": "string"}),
    "minContains": (0,),
    "not": (False,),
    "unevaluatedItems": (True, {}),
    "unevaluatedProperties": (True, {}),
    "dependencies": ({},),
    "dependentRequired": ({},),
    "dependentSchemas": ({},),
}
_MAY_BE_NULL = ("const", "default", "example")
_SCHEMAS = ("additionalProperties", "additionalItems", "items")
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_MAPS = ("properties", "patternProperties", "$defs", "definitions")
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
_COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
_CONSTRAINTS = frozenset(
    {
        *("$ref", "type", "enum", "const", "pattern", "format", "required", "properties", "patternProperties"),
        *(*_SCHEMAS, *_LISTS, *_BOUNDS, *_COUNTS),
    }
)
_MAX_BOUND = 2**63 - 1
_MAX_DEPTH, _MAX_COMPARISONS = 100, 20_000
_MAX_DIGITS = 15
_LOOKS = re.compile(r"(\(\?<?[=!]|\\[bB1-9]|\\k<)|\\.|\[(?:\\.|[^\]\\])*+\]?", re.DOTALL)
"""In its group: what a regular expression may hold that cannot be enforced."""
_NEVER = {"enum": list[Any]()}
UNSUPPORTED = ("patternProperty regexes", "min/maxProperties only supported")
"""What llguidance says of schemas that it supports without the keywords that ``is_coarse`` leaves out."""
_COARSE = ("minProperties", "maxProperties", "patternProperties")
_MAX_MULTIPLE = 2**32 - 1


class _Rounded(float):
    """A number of more digits than a float keeps."""


def prepare_schema(source: str, strict: bool = False, is_coarse: bool = False) -> str:
    """JSON of a schema that llguidance enforces as far as it can.

    ``format`` is an annotation unless it is one of ``FORMATS``; ``nullable`` (OpenAPI 3.0) allows null; keywords that
    are null are left out.

    Args:
        source: JSON of the schema.
        strict: whether keywords that cannot be enforced are refused; they are left out otherwise.
        is_coarse: whether keywords that only sometimes can be enforced are left out too.

    Raises:
        ValueError: not JSON, not a schema, nested too deeply, keywords that cannot be enforced with ``strict``, or a
            number in ``enum`` or ``const`` that would lose digits.
    """
    try:
        root = json.loads(source, parse_float=_number)
        if isinstance(root, bool):
            root = {} if root else dict(_NEVER)
        if not isinstance(root, dict):
            raise ValueError("a schema must be an object, true or false")
        walk = _Walk(root, is_coarse)
        walk.visit(root)
        made = json.dumps(root, allow_nan=False)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if strict and walk.faults:
        names = ", ".join(dict.fromkeys(walk.faults))
        raise ValueError(f"with strict it must leave out what cannot be enforced: {names}")
    return made


class _Walk:
    """Changes a schema in place.

    Attributes:
        faults: paths of keywords that cannot be enforced.
    """

    def __init__(self, root: dict[str, Any], is_coarse: bool):
        self._root, self._is_coarse = root, is_coarse
        self._seen: set[int] = set()
        self._comparisons = 0
        self.faults: list[str] = []

    def visit(self, root: Any) -> None:
        """Changes a schema, those in it, and those that they refer to."""
        todo: list[tuple[Any, str, int]] = [(root, "", 0)]
        while todo:
            node, path, depth = todo.pop()
            if isinstance(node, bool) or id(node) in self._seen:
                continue
            if not isinstance(node, dict):
                raise ValueError(f"{path or 'it'} must be a schema: an object, true or false")
            if depth > _MAX_DEPTH:
                raise ValueError(f"it must be nested at most {_MAX_DEPTH} deep")
            self._seen.add(id(node))
            for key in [key for key, value in node.items() if value is None and key not in _MAY_BE_NULL]:
                del node[key]  # as fields of requests, a keyword that is null is absent
            inner = [(schema, place, depth + 1) for place, schema in self._inner(node, path)]
            if isinstance(node.get("$ref"), str):
                inner.append((self._target(node["$ref"]), node["$ref"], 0))
            todo += reversed(inner)
            self._change(node, f"{path}." if path else "")

    def _change(self, node: dict[str, Any], prefix: str) -> None:
        for key in [*node]:
            self._keyword(node, key, prefix + key)
        if isinstance(node.get("oneOf"), list) and not self._is_exclusive(node["oneOf"]):
            self.faults.append(f"{prefix}oneOf")
        self._count(node, prefix)
        if node.pop("nullable", None) is True:
            _allow_null(node)

    def _inner(self, node: dict[str, Any], path: str) -> Iterator[tuple[str, Any]]:
        prefix = f"{path}." if path else ""
        for key in _SCHEMAS:
            if key in node and not isinstance(node[key], list):
                yield f"{prefix}{key}", node[key]
        for key in _LISTS:
            if isinstance(node.get(key), list):
                yield from ((f"{prefix}{key}.{place}", inner) for place, inner in enumerate(node[key]))
        for key in _MAPS:
            if isinstance(node.get(key), dict):
                yield from ((f"{prefix}{key}.{name}", inner) for name, inner in node[key].items())

    def _keyword(self, node: dict[str, Any], key: str, path: str) -> None:
        value = node[key]
        if self._is_coarse and key in _COARSE:
            if node.pop(key) and key == "patternProperties":
                node["additionalProperties"] = True
        elif key == "format" and not (isinstance(value, str) and value in FORMATS):
            del node[key]
        elif key == "not" and value in (True, {}):
            node |= _NEVER
            del node[key]
        elif key in _UNENFORCED:
            del node[key]
            if value not in _ASK_NOTHING.get(key, ()):
                self.faults.append(path)
        elif key in ("enum", "const"):
            _require_digits(value, path)
        elif key in _BOUNDS and not isinstance(value, bool) and not _is_kept(key, value):
            del node[key]
            self.faults.append(path)
        elif key in _COUNTS and isinstance(value, float) and value.is_integer():
            node[key] = int(value)
        elif key == "pattern" and isinstance(value, str) and _looks_around(value):
            del node[key]
            self.faults.append(path)
        elif key == "patternProperties" and isinstance(value, dict):
            for pattern in filter(_looks_around, [*value]):
                del value[pattern]
                self.faults.append(f"{path}.{pattern}")
                node["additionalProperties"] = True

    def _count(self, node: dict[str, Any], prefix: str) -> None:
        """Leaves bounds on the number of properties out where some of those that are named may be missing."""
        properties, required = node.get("properties"), _required(node)
        if not isinstance(properties, dict) or {*properties} <= required:
            return
        least, most = node.get("minProperties"), node.get("maxProperties")
        is_closed = node.get("additionalProperties") is False and not node.get("patternProperties")
        if isinstance(least, int):
            del node["minProperties"]
            if least > len(required):
                self.faults.append(f"{prefix}minProperties")
        if isinstance(most, int):
            del node["maxProperties"]
            if not is_closed or most < len(properties):
                self.faults.append(f"{prefix}maxProperties")

    def _target(self, reference: str) -> Any:
        """The schema that a reference within this document leads to; True where there is none, for others to say."""
        target: Any = self._root
        if not reference.startswith("#/"):
            return True
        for name in reference[2:].split("/"):
            name = name.replace("~1", "/").replace("~0", "~")
            target = target.get(name, True) if isinstance(target, dict) else True
        return target

    def _is_exclusive(self, branches: list[Any]) -> bool:
        """Whether no value plainly fits two of some schemas."""
        pairs = ((one, other) for place, one in enumerate(branches) for other in branches[:place])
        return all(self._excludes(one, other) for one, other in pairs)

    def _excludes(self, one: Any, other: Any, depth: int = 0) -> bool:
        self._comparisons += 1
        if depth > _MAX_DEPTH or self._comparisons > _MAX_COMPARISONS:
            return False
        one, other = self._resolved(one), self._resolved(other)
        types, others = _types(one), _types(other)
        if types and others and not types & others:
            return True
        values, theirs = _values(one), _values(other)
        if values is not None and theirs is not None and not values & theirs:
            return True
        if not types == others == {"object"}:
            return False
        pairs = [(_property(one, name), _property(other, name)) for name in _required(one) & _required(other)]
        return any(self._excludes(mine, its, depth + 1) for mine, its in pairs if mine is not None and its is not None)

    def _resolved(self, schema: Any) -> dict[str, Any]:
        for _ in range(_MAX_DEPTH):
            if not isinstance(schema, dict) or not isinstance(schema.get("$ref"), str) or "type" in schema:
                break
            schema = self._target(schema["$ref"])
        return schema if isinstance(schema, dict) else {}


def _required(schema: dict[str, Any]) -> set[str]:
    names = schema.get("required")
    return {name for name in names if isinstance(name, str)} if isinstance(names, list) else set()


def _property(schema: dict[str, Any], name: str) -> Any:
    properties = schema.get("properties")
    return properties.get(name) if isinstance(properties, dict) else None


def _types(schema: dict[str, Any]) -> set[str]:
    """The types that a schema names, integers among numbers."""
    named = schema.get("type")
    types = {one for one in (named if isinstance(named, list) else [named]) if isinstance(one, str)}
    values = _values(schema)
    if not types and values is not None:
        types = {json.loads(value)[0] for value in values}
    return {"number" if one == "integer" else one for one in types}


def _values(schema: dict[str, Any]) -> set[str] | None:
    """JSON of the values that a schema lists, each with its type."""
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if not isinstance(values, list):
        return None
    return {json.dumps([_type_of(value), value], sort_keys=True) for value in values}


def _type_of(value: Any) -> str:
    names = {type(None): "null", bool: "boolean", str: "string", list: "array", dict: "object"}
    return names.get(type(value), "number")


def _allow_null(node: dict[str, Any]) -> None:
    """Null beside what a schema allows."""
    if any(key in node for key in ("$ref", "allOf", "anyOf", "oneOf")):
        kept = {key: node.pop(key) for key in [*node] if key not in _CONSTRAINTS}  # others may be referred to
        inner = dict(node)
        node.clear()
        node |= kept | {"anyOf": [inner, {"type": "null"}]}
        return
    named = node.get("type")
    if isinstance(named, str | list):
        types = [named] if isinstance(named, str) else [*named]
        node["type"] = types if "null" in types else [*types, "null"]
    if "const" in node:
        node["enum"] = [node.pop("const")]
    if isinstance(node.get("enum"), list) and None not in node["enum"]:
        node["enum"] = [*node["enum"], None]


def _number(text: str) -> float:
    number = float(text)
    is_kept = math.isfinite(number) and Decimal(text) == Decimal(repr(number))
    return number if is_kept else _Rounded(number)


def _is_kept(key: str, value: Any) -> bool:
    """Whether a bound keeps its value in llguidance, which counts in floats."""
    if key == "multipleOf" and isinstance(value, int | float) and math.isfinite(value):
        number = Decimal(repr(value))
        return int(number.scaleb(-min(0, int(number.as_tuple().exponent)))) <= _MAX_MULTIPLE
    if isinstance(value, int):
        return abs(value) <= _MAX_BOUND and Decimal(repr(float(value))) == value
    return not isinstance(value, float) or math.isfinite(value)


def _require_digits(value: Any, path: str) -> None:
    """Refuses numbers that would lose digits, in a value of ``enum`` or ``const``."""
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            _require_digits(inner, path)
        return
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    if isinstance(value, float):
        digits = len(Decimal(repr(value)).as_tuple().digits) if math.isfinite(value) else _MAX_DIGITS + 1
        is_kept = not isinstance(value, _Rounded) and digits <= _MAX_DIGITS
    else:
        is_kept = abs(value) <= 2**53 or (abs(value) < 10**300 and Decimal(repr(float(value))) == value)
    if not is_kept:
        shown = "a number" if isinstance(value, float) else value
        raise ValueError(f"{path} must not hold numbers of more than {_MAX_DIGITS} digits, got {shown}: make it text")


def _looks_around(pattern: str) -> bool:
    """Whether a regular expression looks at what stands beside it, or back at what it matched."""
    return any(match[1] for match in _LOOKS.finditer(pattern))
