"""Runs the application under uvicorn until the process is told to end."""

import asyncio
import socket
import sys
from collections.abc import Callable

import uvicorn

from melt_runtime.serve.app import Application

_BACKLOG = 1024
_LAST_SECONDS = 5
"""For connections, once every answer has ended."""


class _Server(uvicorn.Server):
    """Ends answers before connections, so that whoever still waits is told so."""

    def __init__(self, config: uvicorn.Config, drain: Callable[[float], None], seconds: float):
        super().__init__(config)
        self._drain, self._seconds = drain, seconds

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Ends."""
        await asyncio.to_thread(self._drain, self._seconds)
        await super().shutdown(sockets)


def listen(app: Application, host: str, port: int, drain_seconds: float) -> None:
    """Serves until SIGTERM or SIGINT: then no request more is taken, and answers under way get their time.

    Raises:
        OSError: the address cannot be listened on.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
            listener.listen(_BACKLOG)  # whoever reads the line below may connect
        except OSError as error:
            raise OSError(f"cannot listen on {host}, port {port}: {error.strerror or error}") from error
        name = f"[{host}]" if family == socket.AF_INET6 else host
        print(f"listening on http://{name}:{listener.getsockname()[1]}", file=sys.stderr, flush=True)
        config = uvicorn.Config(
            app.asgi,
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=_LAST_SECONDS,
        )
        _Server(config, app.drain, drain_seconds).run(sockets=[listener])
