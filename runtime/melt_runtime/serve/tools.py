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
        rest = self._text[self._said :]
        if self._matcher.found is None:
            return rest, []
        calls = [_parse(part.partition(CLOSE)[0]) for part in rest.split(OPEN)[1:]]
        return ("", [call for call in calls if call]) if all(calls) else (rest, [])


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


def _parse(text: str) -> Call | None:
    try:
        values = json.loads(text)
        name, arguments = values["name"], values["arguments"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return Call(name, json.dumps(arguments)) if isinstance(name, str) and isinstance(arguments, dict) else None
