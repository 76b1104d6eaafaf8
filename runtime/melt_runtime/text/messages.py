"""A chat's messages, checked before a template sees them. Knows nothing of tokenizers."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from melt_runtime.arguments import shown, shown_name
from melt_runtime.errors import TokenError

_MAX_DEPTH = 50
_REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names under which people pass what a model thought; templates read the first, some the second."""


def check_messages(messages: Sequence[Any], takes_parts: bool) -> list[dict[str, Any]]:
    """A copy of plain values, in the form in which transformers gives messages to a template.

    Keys whose value is None are left out; keys beyond ``role`` and ``content`` pass as they are. Where the template
    reads no lists of parts, the parts of a content are joined by line breaks, as vLLM and llama.cpp do.

    Args:
        messages: at least one; each with a role, and a content that is text, a list of text parts
            (``{"type": "text", "text": ...}``), or absent where ``tool_calls`` stand instead.
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
    role, content = made.get("role"), made.get("content")
    if not isinstance(role, str):
        raise TokenError(f"{place}.role must be text such as 'user', got {_got(role)}")
    if isinstance(content, list):
        _check_parts(content, place)
        if not takes_parts:
            made["content"] = "\n".join(part["text"] for part in content)
    elif not (isinstance(content, str) or (content is None and made.get("tool_calls"))):
        raise TokenError(f"{place}.content must be text, got {_got(content)}")
    thought = next((made[name] for name in _REASONING if name in made), None)
    return made if thought is None else {"thinking": thought, **made, "reasoning_content": thought}


def _check_parts(parts: list[Any], place: str) -> None:
    for number, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise TokenError(
                f"{place}.content[{number}] must be {{'type': 'text', 'text': ...}}, got "
                f"{_got(part) if kind is None else f'type {shown(kind)}'}: the model reads text only"
            )


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
