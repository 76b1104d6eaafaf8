"""Runs the application under uvicorn until the process is told to end."""

import asyncio
import errno
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import uvicorn

from melt_runtime.serve.app import Application
from melt_runtime.serve.connections import Connection, ConnectionLimits, Connections, RareLog

_BACKLOG = 1024
_ACCEPTED_AT_ONCE = 16
"""Connections taken in one turn of the event loop: a few turns pass before one too many is closed."""
_LAST_SECONDS = 5
"""For connections, once every answer has ended."""
_NO_RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class Server(uvicorn.Server):
    """Serves an application within limits on connections; at the end, answers end before connections do."""

    def __init__(self, app: Application, limits: ConnectionLimits, drain_seconds: float):
        config = uvicorn.Config(
            app.asgi,
            # Whatever else is installed: the limits are kept by these, and no other protocol takes a connection over.
            loop="asyncio",
            http=cast(Any, partial(Connection, Connections(limits))),
            ws="none",
            # A warning is what any client can cause, with any malformed request.
            log_level="error",
            access_log=False,
            server_header=False,
            backlog=_ACCEPTED_AT_ONCE,
            timeout_graceful_shutdown=_LAST_SECONDS,
        )
        super().__init__(config)
        self._drain, self._seconds = app.drain, drain_seconds
        self._log = RareLog()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begins."""
        asyncio.get_running_loop().set_exception_handler(self._report)
        await super().startup(sockets)
        for listener in sockets or ():
            listener.listen(_BACKLOG)  # asyncio took its own number per turn for the system's queue as well

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Ends."""
        await asyncio.to_thread(self._drain, self._seconds)
        await super().shutdown(sockets)

    def _report(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if isinstance(error, OSError) and error.errno in _NO_RESOURCES:
            self._log(f"no connection can be accepted at the moment: {error.strerror}")
        else:
            loop.default_exception_handler(context)


@contextmanager
def bound(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that has the address; clients are refused until something listens on it.

    Raises:
        OSError: the address cannot be listened on.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with _named(host, port):
            listener.bind((host, port))
        yield listener


def listen(
    app: Application, listener: socket.socket, host: str, drain_seconds: float, limits: ConnectionLimits
) -> None:
    """Serves until SIGTERM or SIGINT: then no new request is accepted, and answers under way get their time.

    Args:
        app: what is served.
        listener: from ``bound``.
        host: as it was asked for.
        drain_seconds: for answers under way at the end.
        limits: on connections.

    Raises:
        OSError: the address cannot be listened on.
    """
    port = listener.getsockname()[1]
    with _named(host, port):
        listener.listen(_BACKLOG)  # whoever reads the line below may connect
    name = f"[{host}]" if listener.family == socket.AF_INET6 else host
    print(f"listening on http://{name}:{port}", file=sys.stderr, flush=True)
    Server(app, limits, drain_seconds).run(sockets=[listener])


@contextmanager
def _named(host: str, port: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(f"cannot listen on {host}, port {port}: {error.strerror or error}") from error
