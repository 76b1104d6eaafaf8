"""What may be said of an answer. What holds in the end, ``request/settings.py`` decides."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import islice
from typing import Any, Literal, TypedDict, Unpack, get_args

from melt_runtime.arguments import instance, is_whole, one_of, real_number, shown, whole_number
from melt_runtime.bundle.contract import MAX_LOOPS
from melt_runtime.memory.plan import Array
from melt_runtime.schedule.depth import EXIT_RULES, ExitRule

MAX_TOKENS = 2**31 - 1
"""Largest token id and largest number of tokens that a field may say."""
_MOST_SEED = 2**64 - 1
_MOST_ELEMENTS = 2**16
_MOST_DIGITS = 10
_MOST_STOP = 1024
MOST_LOGPROBS = 64
"""Likeliest tokens that may be asked for at each place."""
OF_AUTO = ("exit_rule", "exit_threshold", "min_loops", "max_loops")
GrammarKind = Literal["json_schema", "regex", "lark"]
OF_GRAMMAR: tuple[GrammarKind, ...] = get_args(GrammarKind)
"""Fields of which one may say a grammar; a bundle says none."""

LogitsProcessor = Callable[[Sequence[int], Array], Array]
"""Given the answer's token ids so far and a copy of the logits [V] float32, it gives the logits to choose from, [V]; a
token at minus infinity is never chosen. The same ids must give the same result, since drafts are asked for, too."""

Decoding = Literal["plain", "wave"]
DECODINGS = get_args(Decoding)


class GenerationChanges(TypedDict, total=False):
    """Single fields of a ``GenerationConfig``, as keywords."""

    max_new_tokens: int | None
    loops: int | Literal["auto"] | None
    exit_rule: ExitRule | None
    exit_threshold: float | None
    min_loops: int | None
    max_loops: int | None
    decode: Decoding | None
    lag: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[int, float] | None
    logits_processors: Sequence[LogitsProcessor] | None
    logprobs: int | None
    seed: int | None
    stop: Iterable[str] | None
    stop_ids: Iterable[int] | None
    json_schema: Mapping[str, Any] | str | None
    regex: str | None
    lark: str | None


@dataclass(frozen=True)
class GenerationConfig:
    """How to continue a prompt. None means "not said": then the bundle's word holds, then the project's.

    Attributes:
        max_new_tokens: most tokens to generate, at least 1; not said: what is left of the capacity, which also bounds a
            bundle's number. A caller's number that does not fit is refused.
        loops: depth T for prompt and answer, at most 1024, or ``auto``: each token leaves when the answer stands; not
            said: as many as the model was trained with.
        exit_rule: with ``auto``, what lets a token leave: ``gate``, the model's exit gate, when its cumulated exit
            probability reaches the threshold; ``settled``, when a loop changed neither the likeliest token nor, by
            more than the threshold, its probability. Not said: the gate, where the bundle says a threshold for it.
        exit_threshold: of the rule, in [0, 1]; not said: the bundle's for its gate, 0.05 for ``settled``.
        min_loops: with ``auto``, loops that every token takes; not said: 1.
        max_loops: with ``auto``, loops after which every token leaves; not said: as many as were trained.
        decode: ``plain``, or ``wave``: the next token starts from a draft while this one still takes its loops. A
            LoopLM's numbers are those of plain decoding; MELT's are others, but for a ``lag`` of one less than the
            loops (in float32; products of 8 bits may round otherwise). Not said: plain.
        lag: of a wave, loops of a token after which the next one starts, unless it leaves before; not said: 1.
        temperature: 0 is greedy; else logits are divided by it, in [1e-6, 1e6]; not said: 0.
        top_k: keep the k most probable tokens; 0, where not said: all.
        top_p: keep the most probable tokens until their probabilities reach this sum, in (0, 1]; not said: 1.
        min_p: keep tokens at least this fraction as probable as the most probable one, in [0, 1]; not said: 0.
        repetition_penalty: above 1 lowers the logits of tokens that already stand in the context (arXiv 1909.05858), in
            [0.01, 100]; not said: 1.
        presence_penalty: taken off the logit of every token that stands in the answer, in [-2, 2]; not said: 0.
        frequency_penalty: taken off once for each time that it stands there, in [-2, 2]; not said: 0.
        logit_bias: added to the logits of tokens, by their ids, as numbers or as JSON's text, each in [-100, 100]; kept
            sorted. Not said: none.
        logits_processors: called before each choice, in order, before bias and penalties; see ``LogitsProcessor``. Not
            said: none.
        logprobs: how many of the likeliest tokens to name at each place, with the logarithms of their probabilities
            by the model itself, whatever changes its logits after; at most 64. Not said: none, not the chosen one's
            either; 0: the chosen one's alone.
        seed: of the random choice; not said: a new one each time.
        stop: strings of at most 1,024 characters that end generation and are not part of the text; one may hold the
            name of a special token, though none is part of the text. Kept as a tuple. Not said: none.
        stop_ids: tokens that end generation, kept as a tuple; a bundle says its model's, which hold unless others are
            said here. ``()``: none.
        json_schema: that the answer follows, a mapping or JSON's text, kept as text; what of it cannot be enforced is
            refused. Not said: none. Like the next two it needs the extra ``serve``; one of the three may be said.
        regex: regular expression that the whole answer matches. Not said: none.
        lark: grammar in Lark's form, from ``start``, that the answer follows. Not said: none.
    """

    max_new_tokens: int | None = None
    loops: int | Literal["auto"] | None = None
    exit_rule: ExitRule | None = None
    exit_threshold: float | None = None
    min_loops: int | None = None
    max_loops: int | None = None
    decode: Decoding | None = None
    lag: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Mapping[int, float] | None = None
    logits_processors: Sequence[LogitsProcessor] | None = None
    logprobs: int | None = None
    seed: int | None = None
    stop: Iterable[str] | None = None
    stop_ids: Iterable[int] | None = None
    json_schema: Mapping[str, Any] | str | None = None
    regex: str | None = None
    lark: str | None = None

    def __post_init__(self) -> None:
        """Checks every field that was said.

        Raises:
            ValueError: lists every value of a wrong type or outside its rule.
        """
        faults = []
        for name, check in CHECKS.items():
            value = getattr(self, name)
            if value is None:
                continue
            try:
                object.__setattr__(self, name, check(name, value))
            except ValueError as error:
                faults.append(str(error))
        if len(said := [name for name in OF_GRAMMAR if getattr(self, name) is not None]) > 1:
            faults.append(f"one of {', '.join(OF_GRAMMAR)} may be said, got {' and '.join(said)}")
        if faults:
            raise ValueError("; ".join(faults))

    def over(self, other: "GenerationConfig") -> "GenerationConfig":
        """What is said here, and where nothing is, what ``other`` says.

        A number of loops said here ends what ``other`` says of ``auto``, plain decoding what it says of a wave, and a
        grammar its grammar.

        Raises:
            ValueError: ``other`` is no ``GenerationConfig``.
        """
        instance("other", other, GenerationConfig, "a GenerationConfig")
        said = {field.name: getattr(self, field.name) for field in fields(self)}
        idle: tuple[str, ...] = OF_AUTO if is_whole(self.loops) else ()
        idle += ("lag",) if self.decode == "plain" else ()
        idle += OF_GRAMMAR if any(said[name] is not None for name in OF_GRAMMAR) else ()
        # A threshold is its rule's.
        idle += ("exit_threshold",) if self.exit_rule and other.exit_rule not in (None, self.exit_rule) else ()
        other = replace(other, **dict.fromkeys(idle))
        return replace(other, **{name: value for name, value in said.items() if value is not None})

    def with_changes(self, **changes: Unpack[GenerationChanges]) -> "GenerationConfig":
        """A copy with some fields said anew.

        Raises:
            ValueError: an unknown field or a value outside its rule.
        """
        unknown = sorted(changes.keys() - CHECKS.keys())
        if unknown:
            raise ValueError(f"unknown generation options {shown(unknown)}; known: {', '.join(CHECKS)}")
        return GenerationConfig(**changes).over(self)


def _elements(name: str, value: object, rule: str) -> tuple[Any, ...]:
    """Everything that can be iterated, strings and mappings apart; what can be only once is iterated here."""
    if isinstance(value, str | bytes | bytearray | Mapping) or not isinstance(value, Iterable):
        raise ValueError(f"{name} must be {rule}, got {shown(value)}")
    try:
        elements = tuple(islice(value, _MOST_ELEMENTS + 1))
    except TypeError as error:  # an array of no dimension
        raise ValueError(f"{name} must be {rule}, got {shown(value)}") from error
    if len(elements) > _MOST_ELEMENTS:
        raise ValueError(f"{name} must hold at most {_MOST_ELEMENTS} elements, got more")
    return elements


def _strings(name: str, value: object) -> tuple[str, ...]:
    rule = "a sequence of non-empty strings"
    elements = _elements(name, value, rule)
    for element in elements:
        if not isinstance(element, str) or not element:
            raise ValueError(f"{name} must be {rule}, got {shown(element)} in it")
        if len(element) > _MOST_STOP:  # its beginning is looked for at the end of every piece
            raise ValueError(f"{name} must be strings of at most {_MOST_STOP} characters, got {len(element)} in one")
    return elements


def _token_ids(name: str, value: object) -> tuple[int, ...]:
    elements = _elements(name, value, "a sequence of token ids")
    return tuple(whole_number(f"{name}[{place}]", token, 0, MAX_TOKENS) for place, token in enumerate(elements))


def _biases(name: str, value: object) -> dict[int, float]:
    rule = "a mapping from token ids to numbers in [-100, 100]"
    if not isinstance(value, Mapping) or len(value) > _MOST_ELEMENTS:
        raise ValueError(f"{name} must be {rule}, got {shown(value)}")
    check = _real("in [-100, 100]", lambda bias: -100 <= bias <= 100)
    items = [
        (
            whole_number(f"{name}'s token id", _from_digits(token), 0, MAX_TOKENS),
            check(f"{name}[{shown(token)}]", bias),
        )
        for token, bias in value.items()
    ]
    return dict(sorted(items))


def _from_digits(token: object) -> object:
    """A token id that was written as text, as the names of a JSON object are."""
    is_digits = isinstance(token, str) and token.isascii() and token.isdecimal() and len(token) <= _MOST_DIGITS
    return int(token) if is_digits else token  # type: ignore[call-overload]


def _functions(name: str, value: object) -> tuple[LogitsProcessor, ...]:
    elements = _elements(name, value, "a sequence of callables")
    for element in elements:
        if not callable(element):
            raise ValueError(f"{name} must be a sequence of callables, got {shown(element)} in it")
    return elements


def _text(name: str, value: object) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{name} must be a non-empty string, got {shown(value)}")
    return value


def _json_object(name: str, value: object) -> str:
    rule = "a JSON schema: an object, or its text"
    try:
        text = value if isinstance(value, str) else json.dumps(value)
        if isinstance(json.loads(text), dict):
            return text
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{name} must be {rule}, got {shown(value)}: {error}") from error
    raise ValueError(f"{name} must be {rule}, got {shown(value)}")


def _real(rule: str, holds: Callable[[float], bool]) -> Callable[[str, object], float]:
    return partial(real_number, rule=rule, holds=holds)


def _whole(least: int, most: int) -> Callable[[str, object], int]:
    return partial(whole_number, least=least, most=most)


def _loops(name: str, value: object) -> object:
    return value if isinstance(value, str) and value == "auto" else whole_number(name, value, 1, MAX_LOOPS)


def _one_of(names: tuple[str, ...]) -> Callable[[str, object], str]:
    return partial(one_of, known=names)


CHECKS: dict[str, Callable[[str, object], object]] = {
    "max_new_tokens": _whole(1, MAX_TOKENS),
    "loops": _loops,
    "exit_rule": _one_of(EXIT_RULES),
    "exit_threshold": _real("in [0, 1]", lambda value: 0 <= value <= 1),
    "min_loops": _whole(1, MAX_LOOPS),
    "max_loops": _whole(1, MAX_LOOPS),
    "decode": _one_of(DECODINGS),
    "lag": _whole(1, MAX_LOOPS),
    "temperature": _real("0 (greedy) or in [1e-6, 1e6]", lambda value: value == 0 or 1e-6 <= value <= 1e6),
    "top_k": _whole(0, MAX_TOKENS),
    "top_p": _real("in (0, 1]", lambda value: 0 < value <= 1),
    "min_p": _real("in [0, 1]", lambda value: 0 <= value <= 1),
    "repetition_penalty": _real("in [0.01, 100]", lambda value: 0.01 <= value <= 100),
    "presence_penalty": _real("in [-2, 2]", lambda value: -2 <= value <= 2),
    "frequency_penalty": _real("in [-2, 2]", lambda value: -2 <= value <= 2),
    "logit_bias": _biases,
    "logits_processors": _functions,
    "logprobs": _whole(0, MOST_LOGPROBS),
    "seed": _whole(0, _MOST_SEED),
    "stop": _strings,
    "stop_ids": _token_ids,
    "json_schema": _json_object,
    "regex": _text,
    "lark": _text,
}
"""How each field is checked and made of its own type, in the order of ``GenerationConfig``."""

GENERAL_DEFAULTS = GenerationConfig(
    temperature=0.0,
    top_k=0,
    top_p=1.0,
    min_p=0.0,
    repetition_penalty=1.0,
    presence_penalty=0.0,
    frequency_penalty=0.0,
    logit_bias={},
    logits_processors=(),
    stop=(),
    stop_ids=(),
)
"""What holds where neither caller nor bundle says anything."""
