"""Errors in OpenAI's form: ``{"error": {"message", "type", "param", "code"}}``."""

from dataclasses import dataclass
from typing import Any

from melt_runtime.arguments import shown
from melt_runtime.errors import (
    CancelledError,
    CapacityError,
    MeltError,
    NumericalError,
    QueueError,
    RunError,
    SavedError,
)


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


def fault_of(error: Exception) -> Fault:
    """What a request is told of an error of the runtime."""
    if isinstance(error, CapacityError):
        return Fault(400, str(error), param="messages", code="context_length_exceeded")
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
    if isinstance(error, MeltError | ValueError):
        return Fault(400, str(error), code="invalid_value")
    return Fault(500, f"an error of the server itself: {type(error).__name__}", "server_error", code="internal_error")


def fault_of_form(errors: list[dict[str, Any]]) -> Fault:
    """What a request is told whose body is not what its form asks for."""
    messages, params = [], []
    for error in errors[:8]:
        # Of a union pydantic names the branch that it tried last: `str`, `list[...]`; those are no fields.
        place = [part for part in error["loc"] if part != "body" and not _is_branch(part)]
        name = ".".join(map(str, place))
        params.append(name)
        messages.append(_sentence(name, error))
    said = list(dict.fromkeys(messages))
    code = "json_invalid" if errors[0]["type"] == "json_invalid" else "invalid_value"
    return Fault(400, "; ".join(said), param=None if code == "json_invalid" else params[0] or None, code=code)


def _is_branch(part: object) -> bool:
    return (isinstance(part, str) and not part.isidentifier()) or part in ("str", "int", "float", "bool")


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
