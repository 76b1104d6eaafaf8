"""An HTTP request and its answer on their way between two processes, and an ASGI application asked without a socket."""

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

from melt_runtime.serve.guard import App, Message

Headers = tuple[tuple[bytes, bytes], ...]


@dataclass(frozen=True)
class HttpRequest:
    """A request, whole.

    Attributes:
        method: ``GET``, ``POST``, ...
        path: of the URL, decoded.
        query: of the URL, as it came.
        headers: names in lower case.
        body: all of it.
    """

    method: str
    path: str
    query: bytes = b""
    headers: Headers = ()
    body: bytes = b""


@dataclass(frozen=True)
class Head:
    """With what an answer begins.

    Attributes:
        status: of HTTP.
        headers: as the application gave them.
    """

    status: int
    headers: Headers


async def exchange(app: App, request: HttpRequest) -> AsyncGenerator[Head | bytes, None]:
    """The head of an application's answer, then its body, in pieces. Left early, the application is told so."""
    messages: asyncio.Queue[Message | None] = asyncio.Queue()
    is_told = False

    async def receive() -> Message:
        nonlocal is_told
        if is_told:
            await asyncio.get_running_loop().create_future()  # whoever goes away ends the task
        is_told = True
        return {"type": "http.request", "body": request.body, "more_body": False}

    async def run() -> None:
        try:
            await app(_scope(request), receive, messages.put)
        finally:
            messages.put_nowait(None)

    task = asyncio.create_task(run())
    try:
        ended = False
        while not ended and (message := await messages.get()) is not None:
            if message["type"] == "http.response.start":
                yield Head(message["status"], tuple((bytes(name), bytes(value)) for name, value in message["headers"]))
                continue
            pieces = [message.get("body", b"")]
            while not ended and not messages.empty():  # each piece takes its time to send: what is there goes as one
                more = messages.get_nowait()
                ended = more is None
                pieces.append(b"" if more is None else more.get("body", b""))
            if any(pieces):
                yield b"".join(pieces)
        await task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def _scope(request: HttpRequest) -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": request.method,
        "scheme": "http",
        "path": request.path,
        "raw_path": request.path.encode(),
        "query_string": request.query,
        "root_path": "",
        "headers": [list(header) for header in request.headers],
        "client": None,
        "server": None,
    }
