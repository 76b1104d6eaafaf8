"""Which conversation a request belongs to: what its turns have in common, whatever the model. Knows nothing of Ray."""

import hashlib
import json
import re
from collections.abc import Iterable
from typing import Any

SESSION_HEADER = b"x-session-id"
"""By which a client names a conversation itself, as elsewhere in Ray Serve."""

PREFIX_CHARACTERS = 128
PREFIX_TOKENS = 32
"""Of a plain completion's prompt; what is longer and begins alike belongs together."""

_SESSION_PATH = re.compile(r"/v1/sessions/([^/]+)(?:/restore)?")


def conversation_key(path: str, headers: Iterable[tuple[bytes, bytes]], body: bytes) -> str:
    """A short name for the conversation of a request; empty where it belongs to none.

    The first of these that a request has: the header ``x-session-id``; below ``/v1``, in its body, ``messages``, of
    which those up to the first one by the user count, or a ``prompt``, of which the beginning counts; the name of a
    session in its path.

    Args:
        path: of the URL.
        headers: names in lower case.
        body: JSON, or anything else, which has no key.
    """
    named = next((value for name, value in headers if name == SESSION_HEADER), b"")
    if named:
        return _digest(["session", named.decode("latin-1")])
    if not path.startswith("/v1/"):
        return ""
    root = _root(body)
    if root is not None:
        return _digest(root)
    found = _SESSION_PATH.fullmatch(path)
    return _digest(["session", found[1]]) if found else ""


def _root(body: bytes) -> list[Any] | None:
    """What the conversation of a body began with; None where it has none."""
    try:
        values = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if not isinstance(values, dict):
        return None
    messages, prompt = values.get("messages"), values.get("prompt")
    if isinstance(messages, list) and messages:
        return ["messages", *_first_messages(messages)]
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
        prompt = prompt[0]  # of several, which are answered together
    if isinstance(prompt, str) and prompt:
        return ["text", prompt[:PREFIX_CHARACTERS]]
    return ["tokens", *prompt[:PREFIX_TOKENS]] if isinstance(prompt, list) and prompt else None


def _first_messages(messages: list[Any]) -> list[Any]:
    """Role and text of each message up to the first one by the user."""
    found = []
    for message in messages:
        if not isinstance(message, dict):
            break
        found.append([message.get("role"), _text(message.get("content"))])
        if message.get("role") == "user":
            break
    return found


def _text(content: Any) -> Any:
    """A message's text, of which clients send the parts either joined or one by one."""
    if not isinstance(content, list):
        return content
    return "".join(str(part.get("text")) for part in content if isinstance(part, dict))


def _digest(values: list[Any]) -> str:
    return hashlib.blake2b(json.dumps(values).encode(), digest_size=16).hexdigest()
