"""Answers that follow a grammar: a JSON schema, a regular expression, or Lark. By llguidance (extra ``serve``)."""

import json
import time
from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np

from melt_runtime.arguments import one_of
from melt_runtime.memory.plan import Array
from melt_runtime.text.codec import TextCodec

GrammarKind = Literal["json_schema", "regex", "lark"]
GRAMMARS = get_args(GrammarKind)
MOST_BYTES = 1 << 16
"""Of a grammar's source."""
_MOST_SHOWN = 300
_LIMITS = {"initial_lexer_fuel": 1_000_000, "max_grammar_size": 200_000, "max_lexer_states": 100_000}
"""What compiling may cost, in llguidance's own units: fractions of a second here."""
_MOST_SECONDS, _SECONDS_A_TOKEN = 1.0, 0.02
"""Processor time that following a grammar may take of an answer: so much, and so much more for each token. Most take
microseconds; a short one can take seconds (``(/a/){100}{1000}``), and everybody who shares the passes waits for it."""


SPACES = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""JSON on one line, as models have read most of it: a small one that may write spaces for ever does so."""


class GrammarError(ValueError):
    """A grammar that cannot be compiled, or that costs more than it may."""


class Grammars:
    """Compiles grammars over one tokenizer."""

    def __init__(self, codec: TextCodec, vocab_size: int, stop_ids: Sequence[int]):
        """Reads the tokenizer, which takes a while for a large one.

        Args:
            codec: its text.
            vocab_size: of the model's logits.
            stop_ids: tokens that end an answer, which the grammar allows at its end.

        Raises:
            GrammarError: llguidance is not installed, no token ends an answer, or it refuses the tokenizer.
        """
        try:
            import llguidance
        except ModuleNotFoundError as error:
            raise GrammarError("grammars need llguidance: pip install 'melt-onnx[serve]'") from error
        if not stop_ids:
            raise GrammarError("grammars need a token that ends an answer: stop_ids of this bundle are empty")
        self._library: Any = llguidance
        self._vocab_size = vocab_size
        try:
            tokenizer = json.dumps(_without_prefix_space(json.loads(codec.tokenizer.to_str())))
            self._tokenizer = llguidance.LLTokenizer(tokenizer, vocab_size, [*stop_ids])
        except Exception as error:  # of whatever kind its parser raises
            raise GrammarError(f"llguidance cannot read this bundle's tokenizer: {error}") from error

    def compile(self, kind: GrammarKind, source: str) -> "Grammar":
        """A grammar from its source: JSON of a schema, a regular expression, or Lark.

        Raises:
            GrammarError: it is too large, or none.
        """
        one_of("grammar", kind, GRAMMARS)
        if len(source.encode("utf-8", "replace")) > MOST_BYTES:
            raise GrammarError(f"a grammar may have {MOST_BYTES} bytes, got {len(source)} characters")
        matcher = self._library.LLMatcher
        make = {
            "json_schema": lambda schema: matcher.grammar_from_json_schema(schema, SPACES),
            "regex": matcher.grammar_from_regex,
            "lark": matcher.grammar_from_lark,
        }
        try:
            grammar = make[kind](source)
        except ValueError as error:
            raise GrammarError(f"the {kind} cannot be compiled: {_short(error)}") from error
        made = matcher(self._tokenizer, grammar, log_level=0, limits=self._library.LLParserLimits(**_LIMITS))
        if made.is_error():
            raise GrammarError(f"the {kind} cannot be compiled: {_short(made.get_error())}")
        return Grammar(made)


class Grammar:
    """A compiled grammar; ``processor`` makes a ``LogitsProcessor`` for each answer."""

    def __init__(self, matcher: Any):
        self._matcher = matcher

    def processor(self) -> "GrammarProcessor":
        """One that begins at the grammar's start."""
        return GrammarProcessor(self._matcher.deep_copy())


class GrammarProcessor:
    """Forbids every token with which the answer could no longer become one of the grammar's texts.

    It remembers the tokens that it has followed and goes back where it is asked for others, as by a wave's drafts.
    """

    def __init__(self, matcher: Any):
        self._matcher = matcher
        self._followed: list[int] = []
        self._seconds = 0.0

    def __call__(self, ids: Sequence[int], logits: Array) -> Array:
        """As ``LogitsProcessor`` says.

        Raises:
            GrammarError: following it costs more than it may.
        """
        began = time.thread_time()
        try:
            return self._follow(ids, logits)
        finally:
            self._seconds += time.thread_time() - began
            if self._seconds > _MOST_SECONDS + _SECONDS_A_TOKEN * len(ids):
                raise GrammarError(f"the grammar costs more than it may: {self._seconds:.1f} s in {len(ids)} tokens")

    def _follow(self, ids: Sequence[int], logits: Array) -> Array:
        shared = next(
            (place for place, (one, other) in enumerate(zip(self._followed, ids, strict=False)) if one != other),
            min(len(self._followed), len(ids)),
        )
        matcher = self._matcher
        if shared < len(self._followed):
            matcher.rollback(len(self._followed) - shared)
            del self._followed[shared:]
        for token in ids[shared:]:
            # Beyond the end, or where the grammar does not lead, there are only drafts that nobody keeps.
            if matcher.is_stopped() or not matcher.try_consume_tokens([token]):
                return logits
            self._followed.append(token)
        if matcher.is_error():
            raise GrammarError(f"the grammar cannot be followed: {_short(matcher.get_error())}")
        if matcher.is_stopped() and self._followed and not matcher.is_accepting():
            return logits
        allowed = np.frombuffer(matcher.compute_logit_bias(), dtype=np.uint8)[: len(logits)]
        if matcher.is_error():
            raise GrammarError(f"the grammar cannot be followed: {_short(matcher.get_error())}")
        logits[: len(allowed)][allowed == 0] = -np.inf
        logits[len(allowed) :] = -np.inf
        return logits


def _without_prefix_space(tokenizer: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer's JSON that puts no space before a text: forced text is tokenized in the middle of an answer."""

    def changed(part: Any) -> Any:
        if isinstance(part, list):
            return [changed(one) for one in part if not (isinstance(one, dict) and one.get("type") == "Prepend")]
        if not isinstance(part, dict):
            return part
        part = {name: changed(value) for name, value in part.items()}
        if part.get("type") == "Prepend":
            return None
        if part.get("type") in ("ByteLevel", "Metaspace"):
            part["add_prefix_space"] = False
            if "prepend_scheme" in part:
                part["prepend_scheme"] = "never"
        return part

    return tokenizer | {name: changed(tokenizer.get(name)) for name in ("normalizer", "pre_tokenizer")}


def _short(error: object) -> str:
    """The first lines of what llguidance says, without its state."""
    return str(error).split("<state>")[0].strip()[:_MOST_SHOWN]
