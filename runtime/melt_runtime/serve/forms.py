"""What requests may say; a field that asks for what the server does not have is refused by name.

Names and meanings are OpenAI's where it has them; ``top_k``, ``min_p``, ``repetition_penalty`` and ``grammar`` are
those of other servers; ``loops`` and what follows it are the project's own.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from melt_runtime.request.grammar import GrammarKind
from melt_runtime.schedule.depth import ExitRule
from melt_runtime.serve.fields import CHANGES_NOTHING, NEUTRAL, Form
from melt_runtime.serve.messages import Messages
from melt_runtime.text.templates import ChatEnding

MOST_CHOICES = 16
_MOST_STOPS = 16
_MOST_STOP_IDS = 1024
_MAX_BIASES = 4096
Number = float | int


class Function(Form):
    """A function that may be called; ``parameters`` is a JSON schema."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Form):
    """A tool; functions are the only ones."""

    changes_nothing = frozenset({"cache_control"})

    type: Literal["function"]
    function: Function


class ToolName(Form):
    """A function by its name."""

    name: str


class NamedTool(Form):
    """The tool that shall be called."""

    type: Literal["function"]
    function: ToolName


class StreamOptions(Form):
    """What a stream brings beside the answer."""

    changes_nothing = frozenset({"include_obfuscation"})

    include_usage: bool = False


class JsonSchema(Form):
    """A schema that the answer follows."""

    name: str = "answer"
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(Form):
    """Form of the answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _check(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema must be given with type 'json_schema', and only there")
        return self


def _few_without_nulls(values: Any) -> Any:
    """Refuses too many before each of them is looked at."""
    if not isinstance(values, dict):
        return values
    if len(values) > _MAX_BIASES:
        raise ValueError(f"must have at most {_MAX_BIASES} members, got {len(values)}")
    return {key: value for key, value in values.items() if value is not None}


def _without_empty(values: Any) -> Any:
    """A list without what asks for nothing; longer ones are refused by their length before each is looked at."""
    if not isinstance(values, list) or len(values) > _MOST_STOPS:
        return values
    return [value for value in values if value not in (None, "")]


class GrammarForm(Form):
    """A grammar that the answer follows."""

    type: GrammarKind
    value: str


_PENALTIES_OFF = {
    "repetition_penalty": (None, 1),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
}
_WINDOWS = ("repeat_last_n", "penalty_last_n", "repetition_penalty_range")
"""How far penalties reach, in llama.cpp and text-generation-webui."""


class Generation(Form):
    """What completions and chats share. The bundle has the defaults; ``GenerationConfig`` explains the fields."""

    changes_nothing = CHANGES_NOTHING
    neutral = NEUTRAL
    empty_is_absent = True

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] = 1
    best_of: int | None = None
    max_tokens: Annotated[int | None, Field(description="-1: as many as fit")] = None
    temperature: Number | None = None
    top_p: Number | None = None
    top_k: int | None = None
    min_p: Number | None = None
    repetition_penalty: Number | None = None
    presence_penalty: Number | None = None
    frequency_penalty: Number | None = None
    logit_bias: (
        Annotated[dict[str, Number], BeforeValidator(_few_without_nulls), Field(max_length=_MAX_BIASES)] | None
    ) = None
    seed: int | None = None
    stop: (
        str
        | Annotated[list[str], Field(max_length=_MOST_STOPS, fail_fast=True), BeforeValidator(_without_empty)]
        | None
    ) = None
    stop_token_ids: Annotated[list[int], Field(max_length=_MOST_STOP_IDS, fail_fast=True)] | None = None
    grammar: GrammarForm | None = None
    loops: int | Literal["auto"] | None = None
    exit_rule: ExitRule | None = None
    exit_threshold: Number | None = None
    min_loops: int | None = None
    max_loops: int | None = None
    decode: Literal["plain", "wave"] | None = None
    lag: int | None = None

    @model_validator(mode="before")
    @classmethod
    def _leave_out_window(cls, values: Any) -> Any:
        """Penalties are of the whole answer; how far they reach asks for nothing where there are none."""
        if not isinstance(values, dict) or any(values.get(name) not in off for name, off in _PENALTIES_OFF.items()):
            return values
        return {name: value for name, value in values.items() if name not in _WINDOWS}

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.stream_options is not None and self.stream_options.include_usage and not self.stream:
            raise ValueError("stream_options must be left out where stream is false")
        if self.best_of not in (None, 1, self.n):
            raise ValueError(f"best_of must be left out, or equal n ({self.n}), got {self.best_of}")
        return self


class _Ending(Form):
    """How a chat ends, in vLLM's words."""

    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None

    @model_validator(mode="after")
    def _check_ending(self) -> "_Ending":
        if self.add_generation_prompt and self.continue_final_message:
            raise ValueError("add_generation_prompt must be false where continue_final_message is true")
        return self

    @property
    def ending(self) -> ChatEnding:
        """What follows the messages."""
        if self.continue_final_message:
            return "continue"
        return "none" if self.add_generation_prompt is False else "prompt"


class ChatRequest(Generation, _Ending):
    """Body of ``POST /v1/chat/completions``."""

    messages: Messages
    max_completion_tokens: Annotated[int | None, Field(description="-1: as many as fit")] = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=128, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool = True

    @model_validator(mode="after")
    def _check_chat(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs must be left out where logprobs is false")
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise ValueError(
                f"max_tokens must be left out, or equal max_completion_tokens ({self.max_completion_tokens}), "
                f"got {self.max_tokens}"
            )
        if self.grammar is not None and self.wants_json:
            raise ValueError("grammar must be left out where response_format asks for JSON")
        if self.must_call and self.tools is None:
            raise ValueError("tool_choice must be left out, or 'none' or 'auto', where there are no tools")
        if self.must_call and (self.grammar is not None or self.wants_json):
            raise ValueError("tool_choice must be 'auto' or 'none' where a grammar or response_format is given")
        return self

    @property
    def limit_name(self) -> str:
        """Name of the field that limits the answer's tokens."""
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

    @property
    def offered(self) -> list[Tool]:
        """Tools that the model may call."""
        return [] if self.tools is None or self.tool_choice == "none" else self.tools

    @property
    def must_call(self) -> bool:
        """Whether the answer has to be a call."""
        return self.tool_choice == "required" or isinstance(self.tool_choice, NamedTool)

    @property
    def wants_json(self) -> bool:
        """Whether ``response_format`` asks for JSON."""
        return self.response_format is not None and self.response_format.type != "text"


class CompletionRequest(Generation):
    """Body of ``POST /v1/completions``: text, or token ids, as the model shall see it."""

    neutral: ClassVar[Mapping[str, tuple[object, ...]]] = {
        **NEUTRAL,
        "logprobs": (False,),
        "top_logprobs": (0,),
        "add_generation_prompt": (True,),
        "tool_choice": ("none", "auto"),
        "parallel_tool_calls": (True,),
        "response_format": ({"type": "text"},),
    }

    prompt: (
        str
        | Annotated[list[str], Field(fail_fast=True)]
        | Annotated[list[int], Field(fail_fast=True)]
        | Annotated[list[Annotated[list[int], Field(fail_fast=True)]], Field(fail_fast=True)]
    )
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    limit_name: ClassVar[str] = "max_tokens"


class SessionRequest(Form):
    """Body of ``POST /v1/sessions``: the name, and the conversation so far, answers included."""

    model: str | None = None
    name: str
    messages: Messages


class TokenizeRequest(_Ending):
    """Body of ``POST /tokenize``: a text as it is, or a chat by the bundle's template."""

    model: str | None = None
    text: str | None = None
    messages: Messages | None = None

    @model_validator(mode="after")
    def _check(self) -> "TokenizeRequest":
        if (self.text is None) == (self.messages is None):
            raise ValueError("text or messages must be given, and one of them only")
        return self


class DetokenizeRequest(Form):
    """Body of ``POST /detokenize``."""

    model: str | None = None
    tokens: Annotated[list[int], Field(fail_fast=True)]
