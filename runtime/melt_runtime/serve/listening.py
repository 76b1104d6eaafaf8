"""Runs the application under uvicorn until the process is told to end."""

import socket
import sys

import uvicorn

from melt_runtime.serve.guard import App

_BACKLOG = 1024


def listen(app: App, host: str, port: int, drain_seconds: float) -> None:
    """Serves until SIGTERM or SIGINT: then no connection more is taken, and answers under way get their time.

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
            app,
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=max(1, int(drain_seconds)),
        )
        uvicorn.Server(config).run(sockets=[listener])
