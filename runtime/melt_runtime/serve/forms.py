"""What requests may say. A field that is not here is refused by name, never ignored.

Names and meanings are OpenAI's where it has them; ``top_k``, ``min_p``, ``repetition_penalty`` and ``grammar`` are
those of other servers; ``loops`` and what follows it are ours.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from melt_runtime.request.grammar import GrammarKind
from melt_runtime.schedule.depth import ExitRule

MOST_CHOICES = 16
MOST_MESSAGES = 10_000
_MOST_STOPS = 16
Number = float | int


class _Form(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class TextPart(_Form):
    """A part of a message."""

    type: Literal["text"]
    text: str


class CalledFunction(_Form):
    """What was called: a name, and arguments as JSON."""

    name: str
    arguments: str


class ToolCall(_Form):
    """A call of an earlier answer."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(_Form):
    """One message of a chat; ``tool_calls`` are an answer's, ``tool_call_id`` belongs to what such a call gave."""

    role: str
    content: str | Annotated[list[TextPart], Field(fail_fast=True)] | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True)] | None = None
    tool_call_id: str | None = None
    name: str | None = None


class Function(_Form):
    """A function that may be called; ``parameters`` is a JSON schema."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(_Form):
    """A tool; functions are the only ones."""

    type: Literal["function"]
    function: Function


class ToolName(_Form):
    """A function by its name."""

    name: str


class NamedTool(_Form):
    """The tool that shall be called."""

    type: Literal["function"]
    function: ToolName


class StreamOptions(_Form):
    """What a stream brings beside the answer."""

    include_usage: bool = False


class JsonSchema(_Form):
    """A schema that the answer follows."""

    name: str = "answer"
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(_Form):
    """Form of the answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _check(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema must be given with type 'json_schema', and only there")
        return self


class GrammarForm(_Form):
    """A grammar that the answer follows."""

    type: GrammarKind
    value: str


class Generation(_Form):
    """What completions and chats share; what is not said, the bundle says. ``GenerationConfig`` explains the fields."""

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] = 1
    max_tokens: int | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    top_k: int | None = None
    min_p: Number | None = None
    repetition_penalty: Number | None = None
    presence_penalty: Number | None = None
    frequency_penalty: Number | None = None
    logit_bias: Annotated[dict[str, Number], Field(max_length=4096)] | None = None
    seed: int | None = None
    stop: str | Annotated[list[str], Field(max_length=_MOST_STOPS, fail_fast=True)] | None = None
    grammar: GrammarForm | None = None
    loops: int | Literal["auto"] | None = None
    exit_rule: ExitRule | None = None
    exit_threshold: Number | None = None
    min_loops: int | None = None
    max_loops: int | None = None
    decode: Literal["plain", "wave"] | None = None
    lag: int | None = None

    @model_validator(mode="after")
    def _check_stream(self) -> "Generation":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options must be left out where stream is false")
        return self


class ChatRequest(Generation):
    """Body of ``POST /v1/chat/completions``."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MOST_MESSAGES, fail_fast=True)]
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(min_length=1, max_length=128, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None

    @model_validator(mode="after")
    def _check_chat(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs must be left out where logprobs is false")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens must be left out where max_completion_tokens is given")
        if self.grammar is not None and self.response_format is not None and self.response_format.type != "text":
            raise ValueError("grammar must be left out where response_format asks for JSON")
        if self.tool_choice not in (None, "none") and self.tools is None:
            raise ValueError("tool_choice must be left out, or 'none', where there are no tools")
        if self.must_call and (self.grammar is not None or self.response_format is not None):
            raise ValueError("tool_choice must be 'auto' or 'none' where a grammar or response_format is given")
        return self

    @property
    def offered(self) -> list[Tool]:
        """Tools that the model may call."""
        return [] if self.tools is None or self.tool_choice == "none" else self.tools

    @property
    def must_call(self) -> bool:
        """Whether the answer has to be a call."""
        return self.tool_choice == "required" or isinstance(self.tool_choice, NamedTool)


class CompletionRequest(Generation):
    """Body of ``POST /v1/completions``: text, or token ids, as the model shall see it."""

    prompt: (
        str
        | Annotated[list[str], Field(fail_fast=True)]
        | Annotated[list[int], Field(fail_fast=True)]
        | Annotated[list[Annotated[list[int], Field(fail_fast=True)]], Field(fail_fast=True)]
    )
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: Literal[False] = False


class SessionRequest(_Form):
    """Body of ``POST /v1/sessions``: the name, and the conversation so far, answers included."""

    name: str
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MOST_MESSAGES, fail_fast=True)]


class TokenizeRequest(_Form):
    """Body of ``POST /tokenize``: a text as it is, or a chat by the bundle's template."""

    text: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MOST_MESSAGES, fail_fast=True)] | None = None

    @model_validator(mode="after")
    def _check(self) -> "TokenizeRequest":
        if (self.text is None) == (self.messages is None):
            raise ValueError("text or messages must be given, and one of them only")
        return self


class DetokenizeRequest(_Form):
    """Body of ``POST /detokenize``."""

    tokens: Annotated[list[int], Field(fail_fast=True)]
