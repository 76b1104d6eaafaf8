"""A server of the project in this process, on a free port, and what asks it."""

import contextlib
import json
import socket
import threading
import time
import urllib.request

import openai
import pytest

from melt_runtime import MeltModel
from melt_runtime.serve.app import ServeOptions, make_app
from melt_runtime.serve.connections import ConnectionLimits
from melt_runtime.serve.listening import Server


@contextlib.contextmanager
def served(model: MeltModel, limits: ConnectionLimits | None = None, send_buffer: int | None = None, **options):
    """Serves until the block ends; gives the address, ``http://127.0.0.1:PORT``."""
    with socket.socket() as listener:
        if send_buffer is not None:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)  # of every connection
        listener.bind(("127.0.0.1", 0))
        app = make_app(model, ServeOptions(**{"name": "melt-tiny", **options}))
        server = Server(app, limits or ConnectionLimits(256, 256), drain_seconds=0.0)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive()
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


QUESTION = "Ana reports to Ben. Ben works for Cleo. Cleo reports to Dan. Who is two levels above Ana?"


CHAT = [{"role": "user", "content": QUESTION}]


CHATS = "/v1/chat/completions"


JSON = {"Content-Type": "application/json"}


LONG = {"prompt": [5, 6, 7], "max_tokens": 400, "logit_bias": {"3": -100}}


"""An answer that does not end by itself."""


def ask(address, path, body=None, headers=None, method=None):
    """Status, headers and parsed body of a plain request."""
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    headers = {**JSON, **(headers or {})}
    request = urllib.request.Request(f"{address}{path}", data, headers, method=method)
    try:
        with urllib.request.urlopen(request) as response:
            return response.status, response.headers, json.loads(response.read() or b"null")
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers, json.loads(error.read() or b"null")


def wait_until(holds):
    while not holds():
        time.sleep(0.005)


def running(address):
    return ask(address, "/health")[2]["running"]


def read_metrics(address):
    with urllib.request.urlopen(f"{address}/metrics") as response:
        lines = [line for line in response.read().decode().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


KEY = "a-key-of-enough-length"


@pytest.fixture(scope="module")
def model(tiny_bundle):
    return MeltModel.load(tiny_bundle, device="cpu", capacity=512, slots=4)


@pytest.fixture(scope="module")
def lone(model):
    """Answers one at a time, before the server holds the model's session."""

    def answer(prompt, **said):
        return MeltModel.generate(model, prompt, **said)

    return {loops: answer(CHAT, loops=loops, temperature=0.0) for loops in (1, 2, 4)}


@pytest.fixture(scope="module")
def address(model, lone):
    with served(model, queue=64, most_bytes=200_000) as address:
        yield address


@pytest.fixture(scope="module")
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client
