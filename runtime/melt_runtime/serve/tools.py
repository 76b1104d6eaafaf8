"""Functions that a model may call, in the form that most chat templates with tools teach:

<tool_call>
{"name": "weather", "arguments": {"city": "Zurich"}}
</tool_call>
"""

import json
from collections.abc import Sequence

from melt_runtime.request.grammar import GrammarPart
from melt_runtime.serve.calls import Call, read_call
from melt_runtime.serve.forms import Function, NamedTool, Tool
from melt_runtime.text.codec import CALL_MARKERS, TextCodec
from melt_runtime.text.stops import StopMatcher

OPEN, CLOSE = CALL_MARKERS


class CallReader:
    """Takes an answer's text piece by piece and parts it: what is said, and what is called."""

    def __init__(self) -> None:
        self._matcher = StopMatcher((OPEN,))
        self._text, self._said = "", 0  # all of it, and how much of that was said
        self._spaces = ""  # held back, since those before a call are not said

    def push(self, piece: str) -> str:
        """Text that is said, and safe to show."""
        self._text += piece
        found = "" if self._matcher.found is not None else self._matcher.push(piece)
        text = self._spaces + found
        said = text.rstrip()
        self._spaces = text[len(said) :]
        self._said += len(said)
        return said

    def finish(self) -> tuple[str, list[Call]]:
        """What was held back, and the calls; text that is no call after all is said, spaces around calls are not."""
        rest, said, calls = self._text[self._said :], "", list[Call]()
        while OPEN in rest:
            before, _, after = rest.partition(OPEN)
            read = _read_call(after)
            if read is None:
                break
            call, rest = read
            calls.append(call)
            said += before.rstrip()
        return (said + rest).rstrip() if calls else said + rest, calls


def call_grammar(
    tools: Sequence[Tool], choice: NamedTool | None, codec: TextCodec, answer: GrammarPart | None = None
) -> list[GrammarPart]:
    """The grammar of one call: of the function that is chosen, else of any. The first part is Lark of the whole.

    Args:
        tools: functions that may be called.
        choice: the one that must be.
        codec: tells which markers are special tokens, which a model writes instead of their text.
        answer: the grammar of an answer without a call; None: there must be a call.

    Raises:
        ValueError: the chosen function is not one of the tools.
    """
    chosen = [tool.function for tool in tools if choice is None or tool.function.name == choice.function.name]
    if not chosen:
        assert choice is not None
        raise ValueError(f"tool_choice must name one of the tools, got {choice.function.name!r}")
    start, calls = f"call | @{answer.name}" if answer else "call", " | ".join(f"call{i}" for i in range(len(chosen)))
    rules = [f"start: {start}", f'call: {_marker(OPEN, codec)} "\\n" ({calls}) "\\n" {_marker(CLOSE, codec)}']
    parts = [answer] if answer else []
    for place, function in enumerate(chosen):
        before = json.dumps(f'{{"name": {json.dumps(function.name)}, "arguments": ')
        rules.append(f'call{place}: {before} @arguments{place} "}}"')
        parts.append(_arguments(f"arguments{place}", function))
    return [GrammarPart("main", "lark", "\n".join(rules), label="tools"), *parts]


def _arguments(name: str, function: Function) -> GrammarPart:
    """The schema of a call's arguments, a grammar of its own, so that its references stay within it."""
    label = f"tools: parameters of {function.name}"
    try:
        source = json.dumps({"type": "object"} | (function.parameters or {}))
    except RecursionError as error:
        raise ValueError(f"{label} are nested too deeply") from error
    return GrammarPart(name, "json_schema", source, bool(function.strict), label)


def _marker(text: str, codec: TextCodec) -> str:
    """Lark of a marker: a special token has no text and is named by its id."""
    added = codec.tokenizer.get_added_tokens_decoder()
    special = [token for token, form in added.items() if form.special and form.content == text]
    return f"<[{special[0]}]>" if special else json.dumps(text)


def _read_call(text: str) -> tuple[Call, str] | None:
    """A call at the beginning of a text, and what follows it; None where there is none."""
    read = read_call(text)
    if read is None:
        return None
    call, end = read
    rest = text[end:].lstrip()
    if CLOSE.startswith(rest):  # an answer may be cut within the marker
        return call, ""
    return call, rest.removeprefix(CLOSE) if rest.startswith(CLOSE) else text[end:]
