"""A chat's messages, checked before a template sees them. Knows nothing of tokenizers."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from melt_runtime.arguments import shown, shown_name
from melt_runtime.errors import TokenError
from melt_runtime.text.call_arguments import parse_arguments

_MAX_DEPTH = 50
_REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names under which people pass what a model thought; templates read the first, some the second."""


def check_messages(messages: Sequence[Any], takes_parts: bool) -> list[dict[str, Any]]:
    """A copy of plain values, in the form in which transformers gives messages to a template.

    Keys whose value is None are left out; keys beyond ``role`` and ``content`` pass as they are. Where the template
    reads no lists of parts, the parts of a content are joined by line breaks, as vLLM and llama.cpp do. Arguments of
    calls that are text, as in OpenAI's answers, are read (``parse_arguments``). An assistant's message without a
    content has that of its ``refusal``, or none.

    Args:
        messages: at least one; each with a role, and a content that is text, a list of text parts
            (``{"type": "text", "text": ...}``, or ``refusal``), or absent where ``tool_calls`` stand instead.
        takes_parts: whether the template reads lists of parts.

    Raises:
        TokenError: the first message that breaks a rule, by its place.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise TokenError(f"messages must be a list of messages, got {type(messages).__name__}")
    checked = [_check(message, f"messages[{number}]", takes_parts) for number, message in enumerate(messages)]
    if not checked:
        raise TokenError("messages must hold at least one message")
    return checked


def check_tools(tools: Sequence[Any]) -> list[dict[str, Any]]:
    """A copy of plain values of functions that may be called, as OpenAI writes them.

    Raises:
        TokenError: no list of objects, a value that JSON does not have, or text that is none.
    """
    if isinstance(tools, str | bytes | Mapping) or not isinstance(tools, Sequence):
        raise TokenError(f"tools must be a list of functions, got {type(tools).__name__}")
    for number, tool in enumerate(tools):
        if not isinstance(tool, Mapping):
            raise TokenError(f"tools[{number}] must be an object with type and function, got {_got(tool)}")
    return [_plain(tool, f"tools[{number}]") for number, tool in enumerate(tools)]


def require_text(text: str, place: str) -> str:
    """The text itself.

    Raises:
        TokenError: no text, or it holds half of a surrogate pair, which is no character and has no tokens.
    """
    if not isinstance(text, str):
        raise TokenError(f"{place} must be text, got {_got(text)}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"U+{ord(text[error.start]):04X}"
        raise TokenError(
            f"{place} must be text, got the half character {half} at place {error.start}: decode it as UTF-8"
        ) from error
    return text


def _check(message: Any, place: str, takes_parts: bool) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise TokenError(f"{place} must be a message with role and content, got {type(message).__name__}")
    made: dict[str, Any] = _plain({key: value for key, value in message.items() if value is not None}, place)
    role = made.get("role")
    if not isinstance(role, str):
        raise TokenError(f"{place}.role must be text such as 'user', got {_got(role)}")
    calls = made.get("tool_calls")
    if isinstance(calls, list) and calls:
        made["tool_calls"] = [_call(call, f"{place}.tool_calls[{number}]") for number, call in enumerate(calls)]
    elif role == "assistant" and "content" not in made:
        made["content"] = made.get("refusal", "")
    content = made.get("content")
    if isinstance(content, list):
        content = made["content"] = [_part(part, f"{place}.content[{number}]") for number, part in enumerate(content)]
        if not takes_parts:
            made["content"] = "\n".join(part["text"] for part in content)
    elif not (isinstance(content, str) or (content is None and made.get("tool_calls"))):
        raise TokenError(f"{place}.content must be text, got {_got(content)}")
    thought = next((made[name] for name in _REASONING if name in made), None)
    return made if thought is None else {"thinking": thought, **made, "reasoning_content": thought}


def _call(call: Any, place: str) -> Any:
    """A call whose arguments are an object; calls of another form are the template's to read."""
    if not isinstance(call, dict) or not isinstance(call.get("function"), dict):
        return call
    try:
        arguments = parse_arguments(call["function"].get("arguments"))
    except ValueError as error:
        raise TokenError(f"{place}.function.arguments {error}") from error
    return call | {"function": call["function"] | {"arguments": arguments}}


def _part(part: Any, place: str) -> dict[str, Any]:
    """A part of a content that is text; a ``refusal`` is the text that a model said instead of an answer."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "refusal" and isinstance(part.get("refusal"), str):
        return {"type": "text", "text": part["refusal"]}
    if kind != "text" or not isinstance(part.get("text"), str):
        raise TokenError(
            f"{place} must be {{'type': 'text', 'text': ...}}, got "
            f"{_got(part) if kind is None else f'type {shown(kind)}'}: the model reads text only"
        )
    kept: dict[str, Any] = part
    return kept


def _got(value: Any) -> str:
    return "none" if value is None else type(value).__name__


def _plain(value: Any, place: str, depth: int = 0) -> Any:
    """A copy that holds JSON's types only: a template could call what other objects offer."""
    if depth > _MAX_DEPTH:
        raise TokenError(f"{place} is nested deeper than {_MAX_DEPTH}")
    if isinstance(value, str):
        return str.__str__(require_text(value, place))
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise TokenError(f"{place} must be a plain value as JSON has them, got {value}")
        return float(value)
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TokenError(f"{place} must have names as keys, got {shown(key)}")
            require_text(key, f"a key of {place}")
        return {str.__str__(key): _plain(item, f"{place}.{shown_name(key)}", depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{place}[{number}]", depth + 1) for number, item in enumerate(value)]
    raise TokenError(f"{place} must be a plain value as JSON has them, got {type(value).__name__}")
