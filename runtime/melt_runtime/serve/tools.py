"""Functions that a model may call, in the form that most chat templates with tools teach:

<tool_call>
{"name": "weather", "arguments": {"city": "Zurich"}}
</tool_call>
"""

import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from melt_runtime.request.grammar import SPACES
from melt_runtime.serve.forms import NamedTool, Tool
from melt_runtime.text.codec import StopMatcher

OPEN, CLOSE = "<tool_call>", "</tool_call>"


@dataclass(frozen=True)
class Call:
    """A call that a model wrote.

    Attributes:
        name: of the function.
        arguments: JSON, as OpenAI gives it.
        id: by which the result will name it.
    """

    name: str
    arguments: str
    id: str = field(default_factory=lambda: f"call_{uuid.uuid4().hex[:24]}")

    @property
    def form(self) -> dict[str, Any]:
        """OpenAI's object."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


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

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    start = len(text) - len(text.lstrip())
    try:
        values, end = json.JSONDecoder(parse_constant=refuse).raw_decode(text, start)
        name, arguments = values["name"], values["arguments"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    if not isinstance(name, str) or not isinstance(arguments, dict):
        return None
    rest = text[end:].lstrip()
    return Call(name, json.dumps(arguments)), rest.removeprefix(CLOSE) if rest.startswith(CLOSE) else text[end:]
