"""What stands before every request: who may ask, how large a body may be, how long it may take to come."""

import asyncio
import hmac
import ipaddress
import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.responses import JSONResponse

from melt_runtime.serve.counting import MAX_PARTS, count_parts, may_exceed
from melt_runtime.serve.errors import Fault
from melt_runtime.serve.pages import PAGES

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

_OPEN = PAGES | {"/health"}
"""Paths that need no key: they say nothing of anybody's requests."""
_HELD_BODIES = 64
"""Maximum number of bodies of full size that are held at a time, also while they are answered."""
_SMALL_BYTES = 1 << 16
"""Size of bodies that are read however many large ones are held."""


class Guard:
    """An ASGI application around another. A body is read whole before it is looked at, up to its limit."""

    def __init__(
        self,
        app: App,
        key: bytes | None,
        hosts: tuple[str, ...] | None,
        most_bytes: int,
        seconds: float,
        count: Callable[[str, int], None],
    ):
        """Guards ``app``.

        Args:
            app: the application.
            key: what a request must show; None: nothing.
            hosts: names that the header ``Host`` may have beside addresses; None: any.
            most_bytes: of a body.
            seconds: that it may take to come.
            count: told of every response, by the path of its endpoint, ``none`` where there is no such, and status.
        """
        self._count = count
        self._app, self._key, self._hosts = app, key, hosts
        self._most_bytes, self._seconds = most_bytes, seconds
        self._held = 0  # bytes of all bodies

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Answers or refuses one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def tell(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._count(getattr(scope.get("route"), "path", "none"), message["status"])
            await send(message)

        fault = self._refuse(scope)
        body = bytearray()
        try:
            if fault is None:
                try:
                    async with asyncio.timeout(self._seconds):
                        fault = await self._read(receive, body)
                except TimeoutError:
                    fault = Fault(408, f"the body must come within {self._seconds:g} s", code="body_timeout")
                except ConnectionError:
                    return  # nobody waits for an answer
            if fault is not None:
                # What is still on its way is not read.
                headers = {**fault.headers, "Connection": "close"}
                await JSONResponse(fault.body, fault.status, headers)(scope, receive, tell)
                return
            await self._app(scope, _replay(bytes(body), receive), tell)
        finally:
            self._held -= len(body)

    def _refuse(self, scope: MutableMapping[str, Any]) -> Fault | None:
        headers = {name.lower(): value for name, value in scope["headers"]}
        if self._key is not None and scope["path"] not in _OPEN and scope["method"] != "OPTIONS":
            scheme, _, shown = headers.get(b"authorization", b"").partition(b" ")
            if not hmac.compare_digest(shown.strip(), self._key) or scheme.lower() != b"bearer":
                message = "an API key is needed: send the header 'Authorization: Bearer KEY' with the server's key"
                return Fault(401, message, "authentication_error", code="invalid_api_key")
        if self._hosts is not None and not _is_known(headers.get(b"host", b"").decode("latin-1"), self._hosts):
            # Names that are known are not listed: a page whose name was made to lead here could read them.
            message = "the header Host must be an address, localhost or a name that --allow-host lists"
            return Fault(403, message, code="unknown_host")
        kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        if scope["method"] == "POST" and kind != b"application/json":
            # Of other kinds a page of anybody's could send one without being allowed to.
            return Fault(415, "the header Content-Type must be application/json", code="unsupported_media_type")
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and (len(length) > 18 or int(length) > self._most_bytes):
            return self._too_large()
        return None

    def _too_large(self) -> Fault:
        return Fault(413, f"the body must be at most {self._most_bytes} bytes", code="body_too_large")

    async def _read(self, receive: Receive, body: bytearray) -> Fault | None:
        """Reads a body into ``body``; why it is refused, or None.

        Raises:
            ConnectionError: the client went away.
        """
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ConnectionError
            part = message.get("body", b"")
            body += part
            self._held += len(part)
            if len(body) > self._most_bytes:
                return self._too_large()
            if self._held > _HELD_BODIES * self._most_bytes and len(body) > _SMALL_BYTES:
                return Fault(429, "too many large bodies at a time; retry later", "rate_limit_error", code="queue_full")
            if not message.get("more_body", False):
                return await _refuse_parts(body)


def _replay(body: bytes, receive: Receive) -> Receive:
    """What an application receives whose body was read."""
    is_told = False

    async def replay() -> Message:
        nonlocal is_told
        if is_told:
            return await receive()
        is_told = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


async def _refuse_parts(body: bytearray) -> Fault | None:
    if not may_exceed(body):
        return None
    count = await asyncio.to_thread(count_parts, body)
    if count <= MAX_PARTS:
        return None
    message = f"the body must have at most {MAX_PARTS} lists, objects and members of objects, got {count}: send less"
    return Fault(413, message, code="body_too_large")


def _is_known(host: str, names: tuple[str, ...]) -> bool:
    """Whether a header ``Host`` is an address or one of ``names``.

    An address is no name that somebody's DNS could lead here.
    """
    name = re.sub(r":\d*$", "", host.strip().lower()).removesuffix(".")
    if name in names:
        return True
    try:
        ipaddress.ip_address(name[1:-1] if name.startswith("[") and name.endswith("]") else name)
    except ValueError:
        return False
    return True
