"""A server of the project in this process, on a free port."""

import contextlib
import socket
import threading

import uvicorn

from melt_runtime import MeltModel
from melt_runtime.serve.app import ServeOptions, make_app


@contextlib.contextmanager
def served(model: MeltModel, **options):
    """Serves until the block ends; gives the address, ``http://127.0.0.1:PORT``."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        app = make_app(model, ServeOptions(**{"name": "melt-tiny", **options}))
        server = uvicorn.Server(uvicorn.Config(app.asgi, log_level="warning", timeout_graceful_shutdown=5))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive()
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()
