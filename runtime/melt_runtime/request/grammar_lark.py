"""Lark sources before they are compiled: bounded in depth, with the names of added tokens resolved."""

import re
from collections.abc import Mapping

MAX_DEPTH = 500
"""Maximum number of rules and terminals, each inside the one before: the compiler calls itself for each."""
# Every quantifier is possessive and no end is required, so that a hostile source costs time in proportion to its size.
_TEXT = re.compile(r"""(?:\#|//)[^\n]*+|"(?:\\.|[^"\\\n])*+"?|/(?:\\.|[^/\\\n])++/?""")
_DEFINITION = re.compile(r"^[ \t]*+[!?_]*+([A-Za-z][\w-]*+)[^\n:|]*+:(?!:)", re.MULTILINE)
_NAME = re.compile(r"[A-Za-z][\w-]*")
_TOKEN = re.compile(r"<[^<>\s\[\]]+>")


def prepare_lark(source: str, markers: Mapping[str, int]) -> str:
    """A source in which ``<name>`` of an added token that is text is named by its id, as llguidance asks for.

    Args:
        source: Lark.
        markers: added tokens that are text, by their text.

    Raises:
        ValueError: rules refer to each other in too long a chain.
    """
    # Strings, regular expressions and comments are blanked, so that only names and marks of Lark itself are left.
    bare = _TEXT.sub(lambda match: " " * len(match[0]), source)
    depth = _depth(_references(bare))
    if depth > MAX_DEPTH:
        raise ValueError(f"it must chain at most {MAX_DEPTH} rules or terminals, one inside another, got {depth}")
    parts, end = [], 0
    for match in _TOKEN.finditer(bare):
        token = markers.get(match[0])
        if token is not None:
            parts += [source[end : match.start()], f"<[{token}]>"]
            end = match.end()
    return "".join([*parts, source[end:]])


def _references(bare: str) -> dict[str, list[str]]:
    """The names that each definition mentions."""
    matches = [*_DEFINITION.finditer(bare)]
    ends = [match.start() for match in matches[1:]] + [len(bare)]
    return {match[1]: _NAME.findall(bare[match.end() : end]) for match, end in zip(matches, ends, strict=False)}


def _depth(references: Mapping[str, list[str]]) -> int:
    """How deep a compiler goes that compiles what a rule mentions before the rule, each once."""
    deepest, seen = 0, set[str]()
    for first in references:
        path = [] if first in seen else [iter([first])]
        while path:
            name = next(path[-1], None)
            if name is None:
                path.pop()
            elif name in references and name not in seen:
                seen.add(name)
                deepest = max(deepest, len(path))
                path.append(iter(references[name]))
    return deepest
