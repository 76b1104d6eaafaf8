"""Errors in OpenAI's form: ``{"error": {"message", "type", "param", "code"}}``."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from pydantic import BaseModel

from melt_runtime.arguments import shown, shown_name
from melt_runtime.errors import (
    CancelledError,
    CapacityError,
    MeltError,
    NumericalError,
    QueueError,
    RunError,
    SavedError,
    TokenError,
)
from melt_runtime.request.grammar import GrammarError
from melt_runtime.serve.fields import SCHEMA_FIELD


@dataclass(frozen=True)
class Fault:
    """An error and the status that goes with it."""

    status: int
    message: str
    type: str = "invalid_request_error"
    param: str | None = None
    code: str | None = None

    @property
    def body(self) -> dict[str, Any]:
        """The object that is sent."""
        said = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": said}

    @property
    def headers(self) -> dict[str, str]:
        """What goes with it."""
        if self.status == 401:
            return {"WWW-Authenticate": "Bearer"}
        return {"Retry-After": "1"} if self.status in (429, 503) else {}


class FaultError(Exception):
    """Carries a fault to where it is sent."""

    def __init__(self, fault: Fault):
        super().__init__(fault.message)
        self.fault = fault


class FieldError(ValueError):
    """A field of a request outside its rule.

    Attributes:
        param: name of the field, as in the request.
    """

    def __init__(self, param: str, message: str):
        super().__init__(message)
        self.param = param


@contextmanager
def about(form: BaseModel) -> Iterator[None]:
    """Makes errors of the runtime those of a request.

    Raises:
        FaultError: any error of the runtime, with the field that it is about.
    """
    try:
        yield
    except (MeltError, ValueError) as error:
        raise FaultError(fault_of(error, form)) from error


def fault_of(error: Exception, form: BaseModel | None = None) -> Fault:
    """What a request is told of an error.

    Args:
        error: of the runtime, or of the server.
        form: the request; None where it has no body.
    """
    if isinstance(error, FaultError):
        return error.fault
    fault = _fault_of(error)
    if form is None or fault.status != 400:
        return fault
    limit = getattr(form, "limit_name", None)
    message = fault.message if limit is None else fault.message.replace("max_new_tokens", limit)
    message = re.sub("^stop_ids must", "stop_token_ids must", message)
    return replace(fault, message=message, param=fault.param or _param_of(error, message, form))


def _fault_of(error: Exception) -> Fault:
    if isinstance(error, CapacityError):
        return Fault(400, str(error), code="context_length_exceeded")
    if isinstance(error, QueueError):
        is_closing = "closing" in str(error)
        return (
            Fault(503, str(error), "server_error", code="shutting_down")
            if is_closing
            else Fault(429, str(error), "rate_limit_error", code="queue_full")
        )
    if isinstance(error, CancelledError):
        return Fault(503, str(error), "server_error", code="cancelled")
    if isinstance(error, RunError | NumericalError):
        return Fault(500, str(error), "server_error", code="model_error")
    if isinstance(error, SavedError):
        return Fault(409, str(error), code="session_unusable")
    if isinstance(error, FieldError):
        return Fault(400, str(error), param=error.param, code="invalid_value")
    if isinstance(error, MeltError | ValueError):
        return Fault(400, str(error), code="invalid_value")
    return Fault(500, f"an error of the server itself: {type(error).__name__}", "server_error", code="internal_error")


def _param_of(error: Exception, message: str, form: BaseModel) -> str | None:
    """The field of a request that an error is about: one that it names first, else what was to be read."""
    named = _PATH.match(message)
    if named is not None and named[1] in type(form).model_fields:
        return named[0]
    if isinstance(error, GrammarError):
        asks = [name for name in ("grammar", "response_format", "tools") if getattr(form, name, None) is not None]
        schema = getattr(getattr(form, "response_format", None), "json_schema", None)
        return SCHEMA_FIELD if asks[:1] == ["response_format"] and schema is not None else next(iter(asks), None)
    given = [name for name in ("messages", "prompt", "text", "tokens") if getattr(form, name, None) is not None]
    return given[0] if given and isinstance(error, CapacityError | TokenError) else None


_PATH = re.compile(r"([a-z_]+)(?:\.[A-Za-z_]\w*|\[\d+\])*(?=[ :,\[])")
"""A field at the beginning of a message, ``messages[2].content``."""


def fault_of_form(errors: list[dict[str, Any]]) -> Fault:
    """What a request is told whose body is not what its form asks for."""
    messages, params = [], []
    places = [_place(error) for error in errors[:8]]
    for name, error in zip(places, errors, strict=False):
        if any(place.startswith((f"{name}.", f"{name}[")) for place in places):
            continue  # another branch of a union went further
        message = _sentence(name, error)
        named = _PATH.match(message) if error["type"] == "value_error" and not name else None
        params.append(named[0] if named else name)
        messages.append(message)
    said = list(dict.fromkeys(messages))
    code = "json_invalid" if errors[0]["type"] == "json_invalid" else "invalid_value"
    return Fault(400, "; ".join(said), param=None if code == "json_invalid" else params[0] or None, code=code)


def _place(error: dict[str, Any]) -> str:
    """The field of an error, as ``messages[2].content``."""
    # Of a union pydantic names the branch, too: `str`, `list[...]`, the name of a class; those are no fields.
    *path, last = [part for part in error["loc"] if part != "body"] or [""]
    parts = [part for part in path if not _is_branch(part)]
    if error["type"] == "extra_forbidden" or not _is_branch(last):
        parts.append(last)
    return "".join(f"[{part}]" if isinstance(part, int) else f".{shown_name(part)}" for part in parts).lstrip(".")


def _is_branch(part: object) -> bool:
    return isinstance(part, str) and (not part.isidentifier() or part in _BRANCHES or part[0].isupper())


_BRANCHES = ("str", "int", "float", "bool")


def _sentence(name: str, error: dict[str, Any]) -> str:
    kind = error["type"]
    if kind == "json_invalid":
        return f"the body must be JSON: {error.get('ctx', {}).get('error', error['msg'])}"
    if kind == "extra_forbidden":
        return f"{name} is not supported: leave it out"
    if kind == "missing":
        return f"{name or 'the body'} is missing"
    message = error["msg"].removeprefix("Value error, ")
    if kind == "value_error":
        return f"{name}: {message}" if name else message
    return f"{name or 'the body'}: {message[0].lower()}{message[1:]}, got {shown(error.get('input'))}"
