"""The messages of a request: every field that a server puts into an answer is taken back."""

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator

from melt_runtime.serve.counting import MAX_VALUES, count_values
from melt_runtime.serve.fields import MESSAGE_CHANGES_NOTHING, Form
from melt_runtime.text.call_arguments import parse_arguments

MOST_MESSAGES = 10_000


class TextPart(Form):
    """A part of a message; a ``refusal`` is what another server's model said instead of an answer."""

    changes_nothing = MESSAGE_CHANGES_NOTHING

    type: Literal["text", "refusal"]
    text: str | None = None
    refusal: str | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.text is None) != (self.type == "refusal") or (self.refusal is None) != (self.type == "text"):
            raise ValueError(f"a part of type {self.type!r} must have {self.type}, and no other text")
        return self

    @property
    def content(self) -> str:
        """The text of either type."""
        return self.text or self.refusal or ""


Arguments = Annotated[
    dict[str, Any],
    BeforeValidator(parse_arguments),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "object"}], "description": "A JSON object, or its text."}),
]


class CalledFunction(Form):
    """A function's name, and the arguments of a call."""

    changes_nothing = frozenset({"parsed_arguments"})

    name: str
    arguments: Annotated[Arguments, Field(default_factory=dict)]


class ToolCall(Form):
    """A call in an earlier answer."""

    changes_nothing = frozenset({"index", "provider_specific_fields", "extra_content"})

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class Audio(Form):
    """A spoken answer of another server; only its words are read."""

    changes_nothing = frozenset({"id", "data", "expires_at"})

    transcript: str | None = None


class ChatMessage(Form):
    """One message of a chat, with every field that a server puts into an answer.

    ``tool_call_id`` belongs to the result of a call. ``refusal`` and ``audio`` are read where ``content`` is absent;
    ``function_call`` and the role ``function`` are the older form of tools.
    """

    changes_nothing = MESSAGE_CHANGES_NOTHING

    role: str
    content: str | Annotated[list[TextPart], Field(fail_fast=True)] | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True)] | None = None
    tool_call_id: str | None = None
    name: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    thinking: str | None = None
    refusal: str | None = None
    audio: Audio | None = None
    function_call: CalledFunction | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.audio is not None and self.audio.transcript is None and self.content is None:
            raise ValueError("audio must have its transcript, or the message a content: this server keeps no audio")
        return self


def _require_few_values(messages: Any) -> Any:
    """Refuses calls whose arguments, given as text, take long to read, all together."""
    read = [message for message in messages if isinstance(message, dict)] if isinstance(messages, list) else []
    calls = [call for message in read for call in _list(message.get("tool_calls"))]
    functions = [call.get("function") for call in calls if isinstance(call, dict)]
    functions += [message.get("function_call") for message in read]
    texts = [function.get("arguments") for function in functions if isinstance(function, dict)]
    count = sum(count_values(text) for text in texts if isinstance(text, str))
    if count > MAX_VALUES:
        raise ValueError(f"arguments of calls must have at most {MAX_VALUES} JSON values, got {count}")
    return messages


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


Messages = Annotated[
    list[ChatMessage],
    Field(min_length=1, max_length=MOST_MESSAGES, fail_fast=True),
    BeforeValidator(_require_few_values),
]
