"""What may be said of an answer, and what holds in the end: caller over bundle over project, merged in one place.

``GenerationConfig`` is what somebody says, ``GenerationSettings`` what sampler and stream work with.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack, get_args

from melt_runtime.arguments import instance, is_whole, one_of, real_number, shown, whole_number
from melt_runtime.bundle.contract import MAX_LOOPS
from melt_runtime.errors import BundleError
from melt_runtime.schedule.depth import EXIT_RULES, Depth, ExitRule

_MOST_TOKENS = 2**31 - 1
_MOST_SEED = 2**64 - 1
_MOST_ELEMENTS = 2**16
_OF_AUTO = ("exit_rule", "exit_threshold", "min_loops", "max_loops")

SETTLED_THRESHOLD = 0.05
"""How much the likeliest token's probability may move in a loop that changed nothing, where nobody says."""


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
    seed: int | None
    stop: Iterable[str] | None
    stop_ids: Iterable[int] | None


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
        seed: of the random choice; not said: a new one each time.
        stop: strings that end generation and are not part of the text; kept as a tuple. Not said: none.
        stop_ids: tokens that end generation, kept as a tuple; a bundle says its model's, which hold unless others are
            said here. ``()``: none.
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
    seed: int | None = None
    stop: Iterable[str] | None = None
    stop_ids: Iterable[int] | None = None

    def __post_init__(self) -> None:
        """Checks every field that was said.

        Raises:
            ValueError: lists every value of a wrong type or outside its rule.
        """
        faults = []
        for name, check in _CHECKS.items():
            value = getattr(self, name)
            if value is None:
                continue
            try:
                object.__setattr__(self, name, check(name, value))
            except ValueError as error:
                faults.append(str(error))
        if faults:
            raise ValueError("; ".join(faults))

    def over(self, other: "GenerationConfig") -> "GenerationConfig":
        """What is said here, and where nothing is, what ``other`` says.

        A number of loops said here ends what ``other`` says of ``auto``, and plain decoding what it says of a wave.

        Raises:
            ValueError: ``other`` is no ``GenerationConfig``.
        """
        instance("other", other, GenerationConfig, "a GenerationConfig")
        said = {field.name: getattr(self, field.name) for field in fields(self)}
        idle: tuple[str, ...] = _OF_AUTO if is_whole(self.loops) else ()
        idle += ("lag",) if self.decode == "plain" else ()
        # A threshold is its rule's.
        idle += ("exit_threshold",) if self.exit_rule and other.exit_rule not in (None, self.exit_rule) else ()
        other = replace(other, **dict.fromkeys(idle))
        return replace(other, **{name: value for name, value in said.items() if value is not None})

    def with_changes(self, **changes: Unpack[GenerationChanges]) -> "GenerationConfig":
        """A copy with some fields said anew.

        Raises:
            ValueError: an unknown field or a value outside its rule.
        """
        unknown = sorted(changes.keys() - _CHECKS.keys())
        if unknown:
            raise ValueError(f"unknown generation options {shown(unknown)}; known: {', '.join(_CHECKS)}")
        return GenerationConfig(**changes).over(self)


@dataclass(frozen=True)
class GenerationSettings:
    """A ``GenerationConfig`` in which everything is said, made by ``settle``; ``seed`` may still be None.

    ``lag`` is that of a wave; None: plain decoding.
    """

    max_new_tokens: int
    depth: Depth
    lag: int | None
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    seed: int | None
    stop: tuple[str, ...]
    stop_ids: tuple[int, ...]

    @property
    def loops(self) -> int:
        """Most loops that a token takes."""
        return self.depth.most


def settle(
    said: GenerationConfig, bundle: GenerationConfig, trained_loops: int, room: int, has_exit_gate: bool = False
) -> GenerationSettings:
    """The merge: what the caller says, else the bundle, else the project.

    Args:
        said: by the caller.
        bundle: the bundle's defaults.
        trained_loops: depth where nobody says one.
        room: tokens that fit after the prompt; where the caller says no number, no more are generated.
        has_exit_gate: whether the model has one.

    Raises:
        ValueError: what is said of the depth contradicts itself, or the model.
    """
    values = asdict(said.over(bundle).over(GENERAL_DEFAULTS))
    depth = {name: values.pop(name) for name in ("loops", *_OF_AUTO)}
    decode, lag = values.pop("decode"), values["lag"]
    values["depth"] = settled = _settle_depth(said, bundle, depth, trained_loops, has_exit_gate)
    values["lag"] = _settle_lag(said, decode, lag, settled)
    if said.max_new_tokens is None:
        values["max_new_tokens"] = room if bundle.max_new_tokens is None else min(bundle.max_new_tokens, room)
    return GenerationSettings(**values)


def _settle_depth(
    said: GenerationConfig, bundle: GenerationConfig, merged: dict[str, Any], trained_loops: int, has_exit_gate: bool
) -> Depth:
    loops = trained_loops if merged["loops"] is None else merged["loops"]
    if loops != "auto":
        idle = [name for name in _OF_AUTO if getattr(said, name) is not None]
        if idle:
            raise ValueError(f"{', '.join(idle)} must go with loops='auto', got loops={loops}")
        return Depth.fixed(loops)
    most = trained_loops if merged["max_loops"] is None else merged["max_loops"]
    least = 1 if merged["min_loops"] is None else merged["min_loops"]
    if least > most:
        raise ValueError(f"min_loops must be at most max_loops ({most}), got {least}")
    rule: ExitRule = merged["exit_rule"] or ("settled" if bundle.exit_threshold is None else "gate")
    # The bundle's threshold is its gate's: another rule has none of it.
    threshold = said.exit_threshold if rule == "settled" else merged["exit_threshold"]
    if rule == "gate" and not has_exit_gate:
        raise ValueError("exit_rule must be 'settled', got 'gate': this model has no exit gate")
    if rule == "gate" and threshold is None:
        raise ValueError(
            "exit_rule must be 'settled', got 'gate': this bundle's exit gate was not trained; give exit_threshold to "
            "use it all the same"
        )
    return Depth(most, least, rule, SETTLED_THRESHOLD if threshold is None else threshold)


def _settle_lag(said: GenerationConfig, decode: Decoding | None, lag: int | None, depth: Depth) -> int | None:
    if decode != "wave":
        if said.lag is not None:
            raise ValueError(f"lag must go with decode='wave', got lag={lag}")
        return None
    if depth.most < 2:
        raise ValueError("decode must be 'plain' with one loop, got 'wave': a wave needs two loops at least")
    if lag is not None and lag >= depth.most:
        raise ValueError(f"lag must be below the loops ({depth.most}), got {lag}")
    return 1 if lag is None else lag


def describe_defaults(bundle: GenerationConfig, trained_loops: int) -> dict[str, str]:
    """What holds for each field where a caller says nothing, with whose word it is; for people."""
    merged = bundle.over(GENERAL_DEFAULTS)
    unsaid = {
        "max_new_tokens": "what is left of the capacity",
        "loops": f"{trained_loops}, as trained",
        "exit_rule": "settled" if bundle.exit_threshold is None else "gate",
        "exit_threshold": f"{SETTLED_THRESHOLD:g}",
        "min_loops": "1",
        "max_loops": f"{trained_loops}, as trained",
        "decode": "plain",
        "lag": "1",
        "seed": "a new one each time",
    }
    described = {}
    for name in _CHECKS:
        value = getattr(merged, name)
        text = unsaid[name] if value is None else shown(value)
        described[name] = text if getattr(bundle, name) is None else f"{text} (the bundle's)"
    return described


def write_generation_config(path: Path, config: GenerationConfig) -> None:
    """Writes ``generation_config.json``: the fields that are said."""
    said = {name: value for name, value in asdict(config).items() if value is not None}
    path.write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")


def read_generation_config(path: Path, vocab_size: int | None = None) -> GenerationConfig:
    """Reads ``generation_config.json``.

    Args:
        path: the file.
        vocab_size: of the model, for ``stop_ids``.

    Raises:
        BundleError: no object in JSON and UTF-8; else lists unknown keys and values of a wrong type or outside their
            rule.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(f"{path.name} cannot be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise BundleError(f"{path.name} must hold a JSON object, got {shown(values)}")
    faults = [f"{shown(name)} is unknown" for name in values if name not in _CHECKS]
    said: dict[str, Any] = {}
    for name in _CHECKS.keys() & values.keys():
        try:
            said[name] = getattr(GenerationConfig(**{name: values[name]}), name)
        except ValueError as error:
            faults.append(str(error))
    if vocab_size is not None and any(token >= vocab_size for token in said.get("stop_ids") or ()):
        faults.append(f"stop_ids must be below the vocabulary's {vocab_size}, got {shown(said['stop_ids'])}")
    if faults:
        raise BundleError(f"{path.name}: {'; '.join(sorted(faults))}")
    return GenerationConfig(**said)


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
    return elements


def _token_ids(name: str, value: object) -> tuple[int, ...]:
    elements = _elements(name, value, "a sequence of token ids")
    return tuple(whole_number(f"{name}[{place}]", token, 0, _MOST_TOKENS) for place, token in enumerate(elements))


def _real(rule: str, holds: Callable[[float], bool]) -> Callable[[str, object], float]:
    return partial(real_number, rule=rule, holds=holds)


def _whole(least: int, most: int) -> Callable[[str, object], int]:
    return partial(whole_number, least=least, most=most)


def _loops(name: str, value: object) -> object:
    return value if isinstance(value, str) and value == "auto" else whole_number(name, value, 1, MAX_LOOPS)


def _one_of(names: tuple[str, ...]) -> Callable[[str, object], str]:
    return partial(one_of, known=names)


_CHECKS: dict[str, Callable[[str, object], object]] = {
    "max_new_tokens": _whole(1, _MOST_TOKENS),
    "loops": _loops,
    "exit_rule": _one_of(EXIT_RULES),
    "exit_threshold": _real("in [0, 1]", lambda value: 0 <= value <= 1),
    "min_loops": _whole(1, MAX_LOOPS),
    "max_loops": _whole(1, MAX_LOOPS),
    "decode": _one_of(DECODINGS),
    "lag": _whole(1, MAX_LOOPS),
    "temperature": _real("0 (greedy) or in [1e-6, 1e6]", lambda value: value == 0 or 1e-6 <= value <= 1e6),
    "top_k": _whole(0, _MOST_TOKENS),
    "top_p": _real("in (0, 1]", lambda value: 0 < value <= 1),
    "min_p": _real("in [0, 1]", lambda value: 0 <= value <= 1),
    "repetition_penalty": _real("in [0.01, 100]", lambda value: 0.01 <= value <= 100),
    "seed": _whole(0, _MOST_SEED),
    "stop": _strings,
    "stop_ids": _token_ids,
}
"""How each field is checked and made of its own type, in the order of ``GenerationConfig``."""

GENERAL_DEFAULTS = GenerationConfig(
    temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0, stop=(), stop_ids=()
)
"""What holds where neither caller nor bundle says anything."""
