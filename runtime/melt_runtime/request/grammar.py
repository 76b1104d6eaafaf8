"""Answers that follow a grammar: a JSON schema, a regular expression, or Lark. By llguidance (extra ``serve``).

llguidance runs in a process of its own for each grammar (``grammar_host``): a grammar that crashes it, or costs more
than it may, fails the requests that gave it and nothing else.
"""

import itertools
import threading
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from importlib.util import find_spec
from typing import NamedTuple

import numpy as np

from melt_runtime.arguments import one_of
from melt_runtime.errors import QueueError
from melt_runtime.memory.plan import Array
from melt_runtime.request.generation_config import OF_GRAMMAR, GrammarKind
from melt_runtime.request.grammar_host import (
    BUSY,
    FAILED,
    MASK,
    REFUSED,
    Channel,
    GrammarError,
    GrammarHost,
    ProcessEndedError,
    Setup,
)
from melt_runtime.request.grammar_lark import prepare_lark
from melt_runtime.request.grammar_tokens import token_bytes
from melt_runtime.request.json_schema import JSON_OPTIONS, UNSUPPORTED, prepare_schema
from melt_runtime.text.codec import TextCodec

MAX_BYTES = 1 << 16
"""Maximum size of a grammar's source."""
_MAX_SHOWN = 300
_LIMITS = {"initial_lexer_fuel": 1_000_000, "max_grammar_size": 200_000, "max_lexer_states": 100_000}
"""Limits on compiling, in llguidance's own units."""
_MAX_MEMORY_BYTES = 512 << 20
_QUICK_SECONDS, _COMPILE_SECONDS = 0.25, 2.0
"""Processor time for compiling. Nearly all grammars need milliseconds; those that need more are compiled one by one,
and the others do not wait for them."""
_MAX_SLOW = 8
"""Maximum number of those, waiting or compiled."""
_STEP_SECONDS = 1.0
"""Processor time for the mask of one token."""
_MOST_SECONDS, _SECONDS_A_TOKEN = 1.0, 0.02
"""Processor time that following a grammar may take of an answer: so much, and so much more for each token. Most take
microseconds; a short one can take seconds (``(/a/){100}{1000}``), and everybody who shares the passes waits for it."""
_MAX_CACHED, _MAX_OPEN = 32, 256
"""Compiled grammars that are kept for later requests, and maximum number of those in use at a time."""
_MAX_FAILURES = 256
"""Grammars whose errors are kept."""

__all__ = [
    "MAX_BYTES",
    "JSON_OPTIONS",
    "Grammar",
    "GrammarError",
    "GrammarKind",
    "GrammarPart",
    "GrammarProcessor",
    "Grammars",
]


class GrammarPart(NamedTuple):
    """A grammar that others may refer to.

    Attributes:
        name: its name, in Lark ``@name``.
        kind: kind of its source.
        source: JSON of a schema, a regular expression, or Lark.
        strict: whether a schema's keywords that cannot be enforced are refused; they are left out otherwise.
        label: what errors call it; empty: its kind.
    """

    name: str
    kind: GrammarKind
    source: str
    strict: bool = False
    label: str = ""


class Grammars:
    """Compiles grammars over one tokenizer. Its methods may be called from any thread; ``compile`` takes its time."""

    def __init__(self, codec: TextCodec, vocab_size: int, stop_ids: Sequence[int]):
        """Reads the tokenizer, which takes a while for a large one.

        Args:
            codec: the model's tokenizer.
            vocab_size: number of the model's logits.
            stop_ids: tokens that end an answer, which the grammar allows at its end.

        Raises:
            GrammarError: llguidance is not installed, no token ends an answer, or the tokenizer's tokens have no bytes.
        """
        if find_spec("llguidance") is None:
            raise GrammarError("grammars need llguidance: pip install 'melt-onnx[serve]'")
        stop_ids = [token for token in stop_ids if token < vocab_size]
        if not stop_ids:
            raise GrammarError("grammars need a token that ends an answer: stop_ids of this bundle are empty")
        try:
            tokens, special_ids = token_bytes(codec.tokenizer, vocab_size, stop_ids)
        except ValueError as error:
            raise GrammarError(f"grammars cannot use this bundle's tokenizer: {error}") from error
        added = codec.tokenizer.get_added_tokens_decoder()
        self._markers = {form.content: token for token, form in added.items() if not form.special}
        setup = Setup(tokens, special_ids, stop_ids, _LIMITS, JSON_OPTIONS, _MAX_MEMORY_BYTES)
        self._vocab_size = vocab_size
        self._host = GrammarHost(setup)
        self._lock = threading.Lock()
        self._quick, self._slow = threading.Semaphore(2), threading.Lock()
        self._slow_places = threading.Semaphore(_MAX_SLOW)
        self._cached: OrderedDict[tuple[GrammarPart, ...], Grammar] = OrderedDict()
        self._failures: OrderedDict[tuple[GrammarPart, ...], str] = OrderedDict()
        self._compiling: dict[tuple[GrammarPart, ...], threading.Lock] = {}
        self._open: weakref.WeakSet[Grammar] = weakref.WeakSet()

    def compile(self, kind: GrammarKind, source: str, parts: Sequence[GrammarPart] = ()) -> "Grammar":
        """A grammar from its source: JSON of a schema, a regular expression, or Lark.

        Args:
            kind: which of them.
            source: its text.
            parts: grammars that it refers to.

        Raises:
            GrammarError: it is too large, not a grammar, or needs more time or memory than it may.
            QueueError: too many grammars are in use, or take long to compile.
        """
        return self.compile_parts([GrammarPart("main", kind, source), *parts])

    def compile_parts(self, parts: Sequence[GrammarPart]) -> "Grammar":
        """As ``compile``: a grammar, and those that it refers to."""
        size = sum(len(part.source.encode("utf-8", "replace")) for part in parts)
        if size > MAX_BYTES:
            raise GrammarError(f"a grammar may have {MAX_BYTES} bytes, got {size}")
        try:
            return self._get(tuple(self._prepared(part) for part in parts))
        except GrammarError as error:
            lenient = [part.kind == "json_schema" and not part.strict for part in parts]
            if not any(lenient) or not any(phrase in str(error) for phrase in UNSUPPORTED):
                raise
        return self._get(tuple(self._prepared(part, is_coarse=True) for part in parts))

    def close(self) -> None:
        """Ends the processes; answers that follow a grammar fail."""
        with self._lock:
            grammars = [*self._open]
            self._cached.clear()
        for grammar in grammars:
            grammar.close()
        self._host.close()

    def _prepared(self, part: GrammarPart, is_coarse: bool = False) -> GrammarPart:
        """A part as it is compiled."""
        one_of("grammar", part.kind, OF_GRAMMAR)
        source = part.source
        try:
            if part.kind == "json_schema":
                source = prepare_schema(source, part.strict, is_coarse and not part.strict)
            elif part.kind == "lark":
                source = prepare_lark(source, self._markers)
        except ValueError as error:
            raise GrammarError(f"{_called([part])} cannot be compiled: {error}") from error
        return GrammarPart(part.name, part.kind, source, label=part.label)

    def _get(self, parts: tuple[GrammarPart, ...]) -> "Grammar":
        """A grammar that was compiled before, or is now: requests with the same one wait for one compilation."""
        with self._lock:
            lock = self._compiling.setdefault(parts, threading.Lock())
        try:
            with lock:
                return self._found(parts) or self._compile(parts)
        finally:
            with self._lock:
                self._compiling.pop(parts, None)

    def _found(self, parts: tuple[GrammarPart, ...]) -> "Grammar | None":
        with self._lock:
            if parts in self._failures:
                self._failures.move_to_end(parts)
                raise GrammarError(self._failures[parts])
            grammar = self._cached.get(parts)
            if grammar is None or not grammar.is_open:
                return None
            self._cached.move_to_end(parts)
            return grammar

    def _compile(self, parts: tuple[GrammarPart, ...]) -> "Grammar":
        with self._lock:
            if len(self._open) >= _MAX_OPEN:
                raise QueueError(f"too many grammars in use ({_MAX_OPEN}); retry later")
        try:
            channel = self._try_compile(parts)
        except GrammarError as error:
            with self._lock:
                self._failures[parts] = str(error)
                while len(self._failures) > _MAX_FAILURES:
                    self._failures.popitem(last=False)
            raise
        grammar = Grammar(channel, self._vocab_size)
        with self._lock:
            self._open.add(grammar)
            self._cached[parts] = grammar
            while len(self._cached) > _MAX_CACHED:
                self._cached.popitem(last=False)  # its process ends with the last answer that follows it
        return grammar

    def _try_compile(self, parts: tuple[GrammarPart, ...]) -> Channel:
        """The process of a compiled grammar: with little time, then, if it needs more, with more."""
        try:
            with self._quick:
                return self._compile_within(parts, _QUICK_SECONDS)
        except ProcessEndedError:
            if not self._slow_places.acquire(blocking=False):
                raise QueueError(f"{_MAX_SLOW} grammars that take long are to be compiled; retry later") from None
        try:
            with self._slow:
                return self._compile_within(parts, _COMPILE_SECONDS)
        except ProcessEndedError:
            raise GrammarError(
                f"{_called(parts)} cannot be compiled within {_COMPILE_SECONDS:g} s and "
                f"{_MAX_MEMORY_BYTES >> 20} MB, or crashes the compiler: make it smaller, or less nested"
            ) from None
        finally:
            self._slow_places.release()

    def _compile_within(self, parts: tuple[GrammarPart, ...], seconds: float) -> Channel:
        channel = self._host.open()
        reply, _, content = channel.ask({"seconds": seconds, "parts": [part[:3] for part in parts]})
        if reply != MASK:
            channel.close()
        if reply == BUSY:
            raise QueueError("no process is left for another grammar; retry later")
        if reply == FAILED:
            raise GrammarError(f"{_called(parts)} cannot be compiled: {_short(content)}")
        return channel


class Grammar:
    """A compiled grammar; ``processor`` makes a ``LogitsProcessor`` for each answer."""

    def __init__(self, channel: Channel, vocab_size: int):
        """Takes the process that compiled it, and the number of logits."""
        self._channel, self._vocab_size = channel, vocab_size
        self._numbers = itertools.count()
        self._ended: list[int] = []  # answers that are gone, told with the next message

    @property
    def is_open(self) -> bool:
        """Whether its process lives."""
        return self._channel.is_open

    def processor(self) -> "GrammarProcessor":
        """A processor that begins at the grammar's start."""
        return GrammarProcessor(self)

    def new_answer(self) -> int:
        """A number for an answer."""
        return next(self._numbers)

    def end_answer(self, answer: int) -> None:
        """Forgets an answer; called by the garbage collector, at any time."""
        self._ended.append(answer)

    def follow(self, answer: int, drop: int, add: Sequence[int]) -> tuple[int, float, bytes]:
        """The reply for an answer that lost ``drop`` tokens at its end and then got others.

        Raises:
            GrammarError: its process ended.
        """
        ended = [self._ended.pop() for _ in range(len(self._ended))]
        values = {"seconds": _STEP_SECONDS, "answer": answer, "drop": drop, "add": [*map(int, add)], "ended": ended}
        try:
            return self._channel.ask(values)
        except ProcessEndedError:
            raise GrammarError(
                f"the grammar cannot be followed: a token takes more than {_STEP_SECONDS:g} s or "
                f"{_MAX_MEMORY_BYTES >> 20} MB, or crashes its process"
            ) from None

    def allowed(self, mask: bytes) -> Array:
        """Which tokens a mask allows, [V] bool."""
        bits = np.unpackbits(np.frombuffer(mask, dtype=np.uint8), bitorder="little")
        return bits[: self._vocab_size].astype(bool)

    def close(self) -> None:
        """Ends its process."""
        self._channel.close()


class GrammarProcessor:
    """Forbids every token with which the answer could no longer become one of the grammar's texts.

    It remembers the tokens that it has followed and goes back where it is asked for others, as by a wave's drafts. A
    token that the grammar does not allow is an error: of a draft that nobody keeps, or of the answer.
    """

    def __init__(self, grammar: Grammar):
        """Begins an answer of its own."""
        self._grammar = grammar
        self._followed: list[int] = []
        self._seconds = 0.0
        self._begin()

    def __call__(self, ids: Sequence[int], logits: Array) -> Array:
        """As ``LogitsProcessor`` says.

        Raises:
            GrammarError: the answer left the grammar, or following it costs more than it may.
        """
        shared = next(
            (place for place, (one, other) in enumerate(zip(self._followed, ids, strict=False)) if one != other),
            min(len(self._followed), len(ids)),
        )
        drop, add = len(self._followed) - shared, [*ids[shared:]]
        reply, seconds, content = self._grammar.follow(self._answer, drop, add)
        del self._followed[shared:]
        self._seconds += seconds
        if reply == FAILED:
            self._begin()
            if content.startswith(b"NoExtension"):
                raise GrammarError(f"no token of this model continues the grammar after {len(ids)} tokens")
            raise GrammarError(f"the grammar cannot be followed: {_short(content)}")
        if reply == REFUSED:
            taken = int.from_bytes(content, "little")
            self._followed += add[:taken]
            raise GrammarError(
                f"the answer left its grammar: it does not allow token {add[taken]} as number {len(self._followed) + 1}"
            )
        self._followed += add
        if self._seconds > _MOST_SECONDS + _SECONDS_A_TOKEN * len(ids):
            raise GrammarError(f"the grammar costs more than it may: {self._seconds:.1f} s in {len(ids)} tokens")
        allowed = self._grammar.allowed(content)
        if not allowed.any():
            raise GrammarError(f"no token of this model continues the grammar after {len(ids)} tokens")
        logits[: len(allowed)][~allowed] = -np.inf
        logits[len(allowed) :] = -np.inf
        return logits

    def _begin(self) -> None:
        self._followed = []
        self._answer = self._grammar.new_answer()
        weakref.finalize(self, self._grammar.end_answer, self._answer)


def _called(parts: Sequence[GrammarPart]) -> str:
    """What errors call a grammar."""
    return parts[0].label or f"the {parts[0].kind}"


def _short(error: bytes) -> str:
    """The first lines of what llguidance says, without its state."""
    return error.decode("utf-8", "replace").split("<state>")[0].strip()[:_MAX_SHOWN]
