"""Requests to prompts and settings. Knows nothing of HTTP."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from melt_runtime.request.generation_config import CHECKS, GenerationConfig
from melt_runtime.request.grammar import Grammar, GrammarPart
from melt_runtime.request.prompts import Desk, EncodedPrompt
from melt_runtime.serve.errors import FieldError
from melt_runtime.serve.fields import SCHEMA_FIELD
from melt_runtime.serve.forms import ChatRequest, CompletionRequest, NamedTool
from melt_runtime.serve.messages import CalledFunction, ChatMessage
from melt_runtime.serve.tools import OPEN, call_grammar
from melt_runtime.text.codec import Message, TextCodec

Compile = Callable[[Sequence[GrammarPart]], Grammar]
"""Compiles a grammar, and those that it refers to."""


MOST_ANSWERS = 128
"""That one request may ask for."""
COMPLETION_TOKENS = 16
"""Default ``max_tokens`` of ``/v1/completions``, where so many fit."""


@dataclass(frozen=True)
class Ask:
    """One answer that a request asks for.

    Attributes:
        prompt: its token ids.
        config: how to continue it.
        defaults: of this endpoint; the bundle has the others.
    """

    prompt: EncodedPrompt
    config: GenerationConfig
    defaults: GenerationConfig


def asks_of(form: ChatRequest | CompletionRequest, desk: Desk, compile_grammar: Compile) -> list[Ask]:
    """The answers that a request asks for, in the order of their ``index``.

    Raises:
        CapacityError: a prompt that is too long.
        TokenError: an empty prompt, ids outside the vocabulary, or a chat that the template refuses.
        GrammarError: a grammar that cannot be compiled.
        ValueError: tools that the template does not know, or a field outside its rule; then a ``FieldError``.
    """
    prompts = _prompts(form)
    if len(prompts) * form.n > MOST_ANSWERS:
        message = f"prompts times n must be at most {MOST_ANSWERS}, got {len(prompts)} times {form.n}"
        raise FieldError("n" if form.n > 1 else "prompt", message)
    grammar = _grammar(form, desk.codec, compile_grammar)
    settings = _settings(form, desk.defaults)
    is_short = isinstance(form, CompletionRequest) and form.max_tokens is None
    defaults = GenerationConfig(max_new_tokens=COMPLETION_TOKENS if is_short else None)
    asks = []
    for prompt in prompts:
        encoded = _encode(form, prompt, desk)
        for choice in range(form.n):
            if form.seed is not None:
                settings["seed"] = form.seed + choice  # else n answers would be one
            if grammar is not None:
                settings["logits_processors"] = (grammar.processor(),)
            asks.append(Ask(encoded, GenerationConfig(**settings), defaults))
    return asks


def messages_of(messages: list[ChatMessage]) -> list[Message]:
    """A chat as the runtime takes it: arguments of calls are objects."""
    return [cast(Message, _message(message)) for message in messages]


def _message(message: ChatMessage) -> dict[str, Any]:
    is_result = message.role == "function"  # the older form of tools
    made: dict[str, Any] = {"role": "tool" if is_result else message.role, "content": _content(message)}
    calls = [_call(call.function, call.id) for call in message.tool_calls or ()]
    if message.function_call is not None and not calls:
        calls = [_call(message.function_call, None)]
    if calls:
        made["tool_calls"] = calls
    elif message.role == "assistant" and made["content"] is None:
        made["content"] = ""
    thoughts = (message.reasoning_content, message.reasoning, message.thinking)
    more = {
        "tool_call_id": message.tool_call_id,
        "name": message.name,
        "reasoning_content": next((thought for thought in thoughts if thought), None),
    }
    return made | {name: value for name, value in more.items() if value is not None}


def _content(message: ChatMessage) -> str | list[dict[str, str]] | None:
    """A message's text, or its parts; where it has none, the text of its refusal or what was spoken."""
    if isinstance(message.content, list):
        return [{"type": "text", "text": part.content} for part in message.content]
    if message.content is None:
        return message.refusal or (None if message.audio is None else message.audio.transcript)
    return message.content


def _call(function: CalledFunction, name: str | None) -> dict[str, Any]:
    made = {"type": "function", "function": {"name": function.name, "arguments": function.arguments}}
    return made if name is None else {"id": name, **made}


def _prompts(form: ChatRequest | CompletionRequest) -> list[Any]:
    """What is to be answered: messages, text or token ids."""
    if isinstance(form, ChatRequest):
        return [form.messages]
    prompt = form.prompt
    if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
        return [prompt]
    if not prompt:
        raise ValueError("prompt must hold at least one text or token id")
    return list(prompt)


def _encode(form: ChatRequest | CompletionRequest, prompt: Any, desk: Desk) -> EncodedPrompt:
    if not isinstance(form, ChatRequest):
        return desk.read(prompt, raw=True)
    tools = None
    if form.offered:
        if not desk.codec.takes_tools or OPEN not in (desk.codec.chat_template or ""):
            raise ValueError(f"tools must be left out: this bundle's chat template knows none in the form of {OPEN}")
        tools = [tool.model_dump(exclude_none=True) for tool in form.offered]
    return desk.encode_chat(messages_of(prompt), tools, form.ending)


def needs_grammar(form: ChatRequest | CompletionRequest) -> bool:
    """Whether a grammar has to be compiled for a request."""
    if form.grammar is not None:
        return True
    wanted = form.response_format if isinstance(form, ChatRequest) else None
    return isinstance(form, ChatRequest) and (form.must_call or (wanted is not None and wanted.type != "text"))


def _grammar(form: ChatRequest | CompletionRequest, codec: TextCodec, compile_grammar: Compile) -> Grammar | None:
    """The grammar of a request's answers: a call, what is asked of the answer, or either of them."""
    tools = form.offered if isinstance(form, ChatRequest) else []
    if isinstance(form, ChatRequest) and form.must_call:
        choice = form.tool_choice if isinstance(form.tool_choice, NamedTool) else None
        return compile_grammar(call_grammar(tools, choice, codec))
    answer = _answer_grammar(form)
    if answer is None:
        return None
    return compile_grammar(call_grammar(tools, None, codec, answer) if tools else [answer])


def _answer_grammar(form: ChatRequest | CompletionRequest) -> GrammarPart | None:
    """What ``grammar`` or ``response_format`` asks of an answer."""
    if form.grammar is not None:
        return GrammarPart("answer", form.grammar.type, form.grammar.value)
    wanted = form.response_format if isinstance(form, ChatRequest) else None
    if wanted is None or wanted.type == "text":
        return None
    if wanted.json_schema is None:
        return GrammarPart("answer", "json_schema", '{"type": "object"}')
    try:
        source = json.dumps(wanted.json_schema.schema_)
    except RecursionError as error:
        raise ValueError(f"{SCHEMA_FIELD} is nested too deeply") from error
    return GrammarPart("answer", "json_schema", source, bool(wanted.json_schema.strict), SCHEMA_FIELD)


_SAME = (
    *("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"),
    *("loops", "exit_rule", "exit_threshold", "min_loops", "max_loops", "decode", "lag", "logit_bias", "seed"),
)
"""Fields that ``GenerationConfig`` has by the same name."""


def _settings(form: ChatRequest | CompletionRequest, bundle: GenerationConfig) -> dict[str, Any]:
    """The fields of ``GenerationConfig``, processors apart.

    Args:
        form: the request.
        bundle: its defaults; stop tokens of a request hold beside those.

    Raises:
        FieldError: every field outside its rule, by its name in the request.
    """
    requested: dict[str, tuple[str, Any]] = {name: (name, getattr(form, name)) for name in _SAME}
    limit = form.limit_name
    requested["max_new_tokens"] = (limit, None if getattr(form, limit) == -1 else getattr(form, limit))
    requested["stop"] = ("stop", (form.stop,) if isinstance(form.stop, str) else form.stop)
    if form.stop_token_ids:
        requested["stop_ids"] = ("stop_token_ids", [*(bundle.stop_ids or ()), *form.stop_token_ids])
    if isinstance(form, CompletionRequest):
        requested["logprobs"] = ("logprobs", form.logprobs)
    else:
        requested["logprobs"] = ("top_logprobs", (form.top_logprobs or 0) if form.logprobs else None)
    faults = []
    for target, (name, value) in requested.items():
        try:
            if value is not None:
                CHECKS[target](name, value)
        except ValueError as error:
            faults.append(FieldError(name, str(error)))
    if faults:
        raise FieldError(faults[0].param, "; ".join(map(str, faults)))
    return {target: value for target, (_, value) in requested.items()}
