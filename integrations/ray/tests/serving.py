"""What asks a server over HTTP: plain requests and streams, and what came of each."""

import http.client
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

CHATS, TEXTS = "/v1/chat/completions", "/v1/completions"
KEY = "a-key-of-enough-length"
HEADERS = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}


@dataclass
class Told:
    """What a client was told.

    Attributes:
        status: of HTTP; 0 where the connection broke.
        replica: that answered.
        body: of a plain answer.
        events: of a stream, parsed; ``[DONE]`` as None.
    """

    status: int = 0
    replica: str | None = None
    body: dict = field(default_factory=dict)
    events: list = field(default_factory=list)

    @property
    def is_whole(self) -> bool:
        """Whether it is an answer to its end."""
        return self.status == 200 and (not self.events or self.events[-1] is None)

    @property
    def error(self) -> dict | None:
        """What OpenAI's clients would raise; None where there is no such error."""
        last = self.body if not self.events else (self.events[-1] or {})
        return last.get("error")

    @property
    def is_clear(self) -> bool:
        """Whether it is one answer to its end, or one error."""
        errors = [event for event in self.events if event and "error" in event]
        if self.is_whole:
            return not errors and self.error is None
        return bool(self.error) and bool(self.error["message"]) and (self.status >= 500 or len(errors) == 1)


@contextmanager
def asked(port: int, path: str, body: dict | None, headers: dict | None = None) -> Iterator[http.client.HTTPResponse]:
    """The beginning of an answer; the connection is closed at the end."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    try:
        data = None if body is None else json.dumps(body)
        connection.request("GET" if body is None else "POST", path, data, {**HEADERS, **(headers or {})})
        with connection.getresponse() as response:
            yield response
    finally:
        connection.close()


def read(response: http.client.HTTPResponse) -> Told:
    """The rest of an answer."""
    told = Told(response.status, response.getheader("x-melt-replica"))
    if "event-stream" in response.getheader("content-type", ""):
        for line in response:
            if line.startswith(b"data: "):
                text = line[6:].strip()
                told.events.append(None if text == b"[DONE]" else json.loads(text))
    else:
        told.body = json.loads(response.read() or b"{}")
    return told


def ask(port: int, path: str, body: dict | None = None, headers: dict | None = None) -> Told:
    """One request to its end."""
    with asked(port, path, body, headers) as response:
        return read(response)


def long_stream(number: int, tokens: int = 300) -> dict:
    """The body of a stream that does not end by itself; each number is another conversation."""
    prompt = [5 + number % 100, 6 + number // 100, 7]
    return {"prompt": prompt, "max_tokens": tokens, "logit_bias": {"3": -100}, "stream": True, "loops": 4}


def wait_until(holds, seconds: float = 240.0) -> None:
    """Waits until something holds; it must. A busy machine may take minutes to start a replica."""
    ends = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < ends, "it never held"
        time.sleep(0.1)
