"""Functions that a model may call, in the form that most chat templates with tools teach:

<tool_call>
{"name": "weather", "arguments": {"city": "Zurich"}}
</tool_call>
"""

import json
from collections.abc import Sequence

from melt_runtime.request.grammar import SPACES
from melt_runtime.serve.calls import Call, read_call
from melt_runtime.serve.forms import NamedTool, Tool
from melt_runtime.text.codec import StopMatcher

OPEN, CLOSE = "<tool_call>", "</tool_call>"


class CallReader:
    """Takes an answer's text piece by piece and parts it: what is said, and what is called."""

    def __init__(self) -> None:
        self._matcher = StopMatcher((OPEN,))
        self._text, self._said = "", 0  # all of it, and how much of that was said

    def push(self, piece: str) -> str:
        """Text that is said, and safe to show."""
        self._text += piece
        said = "" if self._matcher.found is not None else self._matcher.push(piece)
        self._said += len(said)
        return said

    def finish(self) -> tuple[str, list[Call]]:
        """What was held back, and the calls; text that is no call after all is said."""
        rest, said, calls = self._text[self._said :], "", list[Call]()
        while OPEN in rest:
            before, _, after = rest.partition(OPEN)
            read = _read_call(after)
            if read is None:
                return said + rest, calls
            call, rest = read
            calls.append(call)
            said += before if before.strip() else ""
        return said + (rest if rest.strip() or not calls else ""), calls


def call_grammar(tools: Sequence[Tool], choice: NamedTool | None) -> str:
    """Lark of one call: of the function that is chosen, else of any."""
    chosen = [tool.function for tool in tools if choice is None or tool.function.name == choice.function.name]
    if not chosen:
        assert choice is not None
        raise ValueError(f"tool_choice must name one of the tools, got {choice.function.name!r}")
    forms = [
        {
            "type": "object",
            "properties": {"name": {"const": function.name}, "arguments": function.parameters or {"type": "object"}},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for function in chosen
    ]
    schema = {"x-guidance": SPACES, **(forms[0] if len(forms) == 1 else {"anyOf": forms})}
    return f'start: "{OPEN}\\n" call "\\n{CLOSE}"\ncall: %json {json.dumps(schema)}\n'


def _read_call(text: str) -> tuple[Call, str] | None:
    """A call at the beginning of a text, and what follows it; None where there is none."""
    read = read_call(text)
    if read is None:
        return None
    call, end = read
    rest = text[end:].lstrip()
    return call, rest.removeprefix(CLOSE) if rest.startswith(CLOSE) else text[end:]
