"""Requests to prompts and settings. Knows nothing of HTTP."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from melt_runtime.request.generation_config import GenerationConfig
from melt_runtime.request.grammar import Grammar
from melt_runtime.request.prompts import Prompt
from melt_runtime.serve.forms import ChatMessage, ChatRequest, CompletionRequest, Generation, NamedTool
from melt_runtime.serve.tools import OPEN, call_grammar
from melt_runtime.text.codec import TextCodec

Compile = Callable[[str, str], Grammar]
"""Compiles a grammar of a kind from its source."""


MOST_ANSWERS = 128
"""That one request may ask for."""


@dataclass(frozen=True)
class Ask:
    """One answer that a request asks for.

    Attributes:
        prompt: a chat, text, or token ids.
        config: how to continue it.
        raw: whether a text is given to the model as it is.
    """

    prompt: Prompt
    config: GenerationConfig
    raw: bool


def asks_of(form: ChatRequest | CompletionRequest, codec: TextCodec, compile_grammar: Compile) -> list[Ask]:
    """The answers that a request asks for, in the order of their ``index``.

    Raises:
        TokenError: a chat with tools that the template refuses.
        ValueError: a field outside its rule, as ``GenerationConfig`` says it, tools that the template does not know, or
            a grammar that is none.
    """
    prompts = _prompts(form, codec)
    if len(prompts) * form.n > MOST_ANSWERS:
        raise ValueError(f"prompts times n must be at most {MOST_ANSWERS}, got {len(prompts)} times {form.n}")
    grammar = _grammar(form, compile_grammar)
    asks = []
    for prompt in prompts:
        for choice in range(form.n):
            changes: dict[str, Any] = {}
            if form.seed is not None:
                changes["seed"] = form.seed + choice  # else n answers would be one
            if grammar is not None:
                changes["logits_processors"] = (grammar.processor(),)
            asks.append(Ask(prompt, GenerationConfig(**_settings(form), **changes), raw=True))
    return asks


def messages_of(messages: list[ChatMessage]) -> list[dict[str, Any]]:
    """A chat as the runtime takes it: parts of a message are joined, arguments of calls are objects."""
    return [_message(message) for message in messages]


def _message(message: ChatMessage) -> dict[str, Any]:
    content = message.content
    if isinstance(content, list):
        content = "".join(part.text for part in content)
    made: dict[str, Any] = {"role": message.role, "content": content}
    if message.tool_calls is not None:
        made["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.function.name, "arguments": _arguments(call.function.arguments)},
            }
            for call in message.tool_calls
        ]
    more = {"tool_call_id": message.tool_call_id, "name": message.name}
    return made | {name: value for name, value in more.items() if value is not None}


def _arguments(text: str) -> Any:
    """Of a call: as templates read them, or the text itself where it is no JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _prompts(form: ChatRequest | CompletionRequest, codec: TextCodec) -> list[Prompt]:
    if isinstance(form, ChatRequest) and form.offered:
        if not codec.takes_tools or OPEN not in (codec.chat_template or ""):
            raise ValueError(f"tools must be left out: this bundle's chat template knows none in the form of {OPEN}")
        tools = [tool.model_dump(exclude_none=True) for tool in form.offered]
        return [codec.encode(codec.render(messages_of(form.messages), tools))]  # type: ignore[arg-type]
    if isinstance(form, ChatRequest):
        return [messages_of(form.messages)]  # type: ignore[list-item]
    prompt = form.prompt
    if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
        return [prompt]
    if not prompt:
        raise ValueError("prompt must hold at least one text or token id")
    return list(prompt)  # type: ignore[arg-type]


def _grammar(form: ChatRequest | CompletionRequest, compile_grammar: Compile) -> Grammar | None:
    if form.grammar is not None:
        return compile_grammar(form.grammar.type, form.grammar.value)
    if isinstance(form, ChatRequest) and form.must_call:
        choice = form.tool_choice if isinstance(form.tool_choice, NamedTool) else None
        return compile_grammar("lark", call_grammar(form.offered, choice))
    wanted = form.response_format if isinstance(form, ChatRequest) else None
    if wanted is None or wanted.type == "text":
        return None
    schema: Mapping[str, Any] = {"type": "object"}
    if wanted.json_schema is not None:
        schema = wanted.json_schema.schema_
    try:
        source = json.dumps(schema)
    except RecursionError as error:
        raise ValueError("response_format.json_schema.schema is nested too deeply") from error
    return compile_grammar("json_schema", source)


_SAME = (
    *("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"),
    *("loops", "exit_rule", "exit_threshold", "min_loops", "max_loops", "decode", "lag", "logit_bias"),
)
"""Fields that ``GenerationConfig`` has by the same name."""


def _settings(form: Generation) -> dict[str, Any]:
    """What ``GenerationConfig`` is told, beside the seed and processors."""
    values = {name: getattr(form, name) for name in _SAME}
    values["max_new_tokens"] = form.max_tokens
    values["stop"] = (form.stop,) if isinstance(form.stop, str) else form.stop
    if isinstance(form, ChatRequest):
        if form.max_completion_tokens is not None:
            values["max_new_tokens"] = form.max_completion_tokens
        values["logprobs"] = (form.top_logprobs or 0) if form.logprobs else None
    elif isinstance(form, CompletionRequest):
        values["logprobs"] = form.logprobs
    return values
