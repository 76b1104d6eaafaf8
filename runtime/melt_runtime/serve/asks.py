"""Requests to prompts and settings. Knows nothing of HTTP."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from melt_runtime.request.generation_config import GenerationConfig
from melt_runtime.request.grammar import Grammar
from melt_runtime.request.prompts import Prompt
from melt_runtime.serve.forms import ChatMessage, ChatRequest, CompletionRequest, Generation

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


def asks_of(form: ChatRequest | CompletionRequest, compile_grammar: Compile) -> list[Ask]:
    """The answers that a request asks for, in the order of their ``index``.

    Raises:
        ValueError: a field outside its rule, as ``GenerationConfig`` says it, or a grammar that is none.
    """
    prompts = _prompts(form)
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


def messages_of(messages: list[ChatMessage]) -> list[dict[str, str]]:
    """A chat as the runtime takes it: parts of a message are joined."""
    return [
        {
            "role": message.role,
            "content": message.content
            if isinstance(message.content, str)
            else "".join(part.text for part in message.content),
        }
        for message in messages
    ]


def _prompts(form: ChatRequest | CompletionRequest) -> list[Prompt]:
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
