"""Connections of a server: those that say nothing, that read nothing, that are too many; clients that go away early."""

import asyncio
import contextlib
import errno
import http.client
import json
import select
import socket
import threading

import pytest
from live_server import JSON, LONG, ask, read_metrics, running, served, wait_until

from melt_runtime import CancelledError, GenerationConfig, MeltModel
from melt_runtime.request.prompts import EncodedPrompt
from melt_runtime.serve.app import ServeOptions, make_app
from melt_runtime.serve.asks import Ask
from melt_runtime.serve.connections import Connection, ConnectionLimits, Connections, _network
from melt_runtime.serve.following import RequestLimits, submit
from melt_runtime.serve.listening import Server

HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.fixture(scope="module")
def model(tiny_bundle):
    return MeltModel.load(tiny_bundle, device="cpu", capacity=512, slots=2)


def connect(address):
    host, port = address.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)))


def is_closed(connection):
    """Whether the other side has closed it; what it sent before is dropped."""
    while select.select([connection], [], [], 0)[0]:
        try:
            if not connection.recv(65536):
                return True
        except ConnectionError:
            return True
    return False


def read_answer(connection):
    """Head and body of an answer that is a JSON object."""
    read = b""
    while not read.endswith(b"}"):
        more = connection.recv(4096)
        assert more, read
        read += more
    return read


@pytest.mark.parametrize("begin", [b"", b"GET / HTTP/1.1\r\n", HEALTH + b"G", HEALTH])
def test_a_connection_without_headers_is_closed(model, begin):
    """One that says nothing, one that says a byte now and then, and both again after an answer."""
    with served(model, ConnectionLimits(8, 8, header_seconds=0.1)) as address, connect(address) as silent:
        silent.sendall(begin)
        while not is_closed(silent):
            if begin and begin != HEALTH:
                with contextlib.suppress(ConnectionError):
                    silent.sendall(b"x")


CHUNKED = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n"


@pytest.mark.parametrize("head", [CHUNKED + b"Content-Type: application/json\r\n\r\n", CHUNKED + b"\r\n"])
def test_a_body_that_is_no_http_is_refused_without_a_word_in_the_log(model, capfd, head):
    """Also where the request itself was refused already, which needs no key."""
    with served(model, key=b"a-key-of-enough-length") as address, connect(address) as client:
        client.sendall(head + b"ZZZ\r\n")
        answer = b""
        with contextlib.suppress(ConnectionError):
            while more := client.recv(4096):
                answer += more
        assert answer.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 401 "))
        assert ask(address, "/health")[0] == 200
    assert "Traceback" not in capfd.readouterr().err


def test_a_body_of_too_many_chunks_is_refused(model):
    """Each costs the event loop time, however small it is."""
    head = CHUNKED + b"Content-Type: application/json\r\n\r\n"
    end = b'11\r\n"prompt": [5, 6]}\r\n0\r\n\r\n'
    for chunks, status in ((16_382, b"200"), (16_384, b"400")):
        with served(model, answer_seconds=60.0) as address, connect(address) as client:
            client.sendall(head + b"1\r\n{\r\n" + b"1\r\n \r\n" * chunks + end)
            assert client.recv(4096).startswith(b"HTTP/1.1 " + status)


@pytest.mark.parametrize("ahead", [HEALTH, b"x" * 70_000])
def test_a_client_that_sent_more_and_went_away_is_noticed(model, ahead):
    """One request behind another that is answered; and more than is kept, where nobody needs to go away."""
    with served(model) as address:
        client = connect(address)
        body = json.dumps({**LONG, "loops": 512}).encode()
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        client.sendall(head + b"Content-Length: %d\r\n\r\n%b" % (len(body), body))
        wait_until(lambda: running(address) == 1)
        client.sendall(ahead)
        if ahead == HEALTH:
            ask(address, "/health")  # it was read
            client.close()
        wait_until(lambda: any(name.startswith("melt_answers_total") for name in read_metrics(address)))
        assert read_metrics(address)['melt_answers_total{end="CancelledError"}'] == 1
        client.close()


def test_silent_connections_give_way_to_new_ones(model, capfd):
    with served(model, ConnectionLimits(4, 4)) as address, contextlib.ExitStack() as stack:
        asked = stack.enter_context(connect(address))
        asked.sendall(HEALTH)
        assert read_answer(asked).startswith(b"HTTP/1.1 200")
        silent = [stack.enter_context(connect(address)) for _ in range(40)]
        assert ask(address, "/health")[0] == 200
        asked.sendall(HEALTH)
        assert read_answer(asked).startswith(b"HTTP/1.1 200")  # it has asked before: others go first
        assert sum(not is_closed(one) for one in silent) <= 3
    said = capfd.readouterr().err
    assert "Traceback" not in said
    assert said.count("4 connections from one address") == 1


def test_connections_at_work_are_not_closed_for_new_ones(model):
    body = json.dumps({**LONG, "loops": 256, "stream": True})
    with served(model, ConnectionLimits(2, 2)) as address, contextlib.ExitStack() as stack:
        at_work = []
        for _ in range(2):
            connection = stack.enter_context(contextlib.closing(http.client.HTTPConnection(address[7:])))
            connection.request("POST", "/v1/completions", body, JSON)
            at_work.append(connection.getresponse())
        for _ in range(3):
            with connect(address) as refused:
                wait_until(lambda refused=refused: is_closed(refused))
        assert all(response.readline().startswith(b"data: ") for response in at_work)


class Peer:
    """A connection of the registry, without a socket."""

    def __init__(self, address):
        self.address, self.cycle, self.is_waiting, self.transport = address, None, True, self
        self.closed = False

    def abort(self):
        self.closed = True


def test_one_address_cannot_take_the_places_of_others():
    connections = Connections(ConnectionLimits(6, 3))
    others = [Peer("b"), Peer("b")]
    flood = [Peer("a") for _ in range(50)]
    assert all(connections.admit(peer) for peer in [*others, *flood])
    assert not any(peer.closed for peer in others)
    assert [peer.closed for peer in flood] == [True] * 47 + [False] * 3
    for peer in flood:
        peer.is_waiting = False
        peer.cycle = peer
    assert not connections.admit(Peer("a"))
    assert connections.admit(Peer("b"))
    assert connections.admit(Peer("c"))  # in all as many as may: the silent one of another address goes
    assert others[0].closed
    for peer in [*others, *flood]:
        connections.discard(peer)
        connections.discard(peer)
    assert [connections.admit(Peer("a")) for _ in range(3)] == [True] * 3


@pytest.mark.parametrize(
    ("address", "network"),
    [
        ("10.0.0.1", "10.0.0.1"),
        ("2001:db8:1:2:3::4", "2001:db8:1:2::/64"),
        ("::ffff:10.0.0.1", "10.0.0.1"),
        ("fe80::1%eth0", "fe80::/64"),
        ("", ""),
    ],
)
def test_what_counts_as_one_address(address, network):
    assert _network(address) == network


@pytest.mark.parametrize(("descriptors", "total"), [(1 << 20, 1160), (1024, 1024 - 128 - 50), (100, 8)])
def test_limits_fit_into_the_descriptors_of_the_process(monkeypatch, descriptors, total):
    monkeypatch.setattr("melt_runtime.serve.connections._free_descriptors", lambda: descriptors - 50)
    limits = ConnectionLimits.for_process(136, 5.0)
    assert (limits.total, limits.per_address, limits.stall_seconds) == (total, total // 2, 5.0)


def test_no_descriptors_left_is_a_line_and_no_traceback(model, capfd):
    server = Server(make_app(model, ServeOptions("x")), ConnectionLimits(4, 4), 0.0)
    told = []

    class Loop:
        def default_exception_handler(self, context):
            told.append(context)

    for _ in range(1000):
        server._report(Loop(), {"exception": OSError(errno.EMFILE, "Too many open files")})
    server._report(Loop(), {"exception": ZeroDivisionError()})
    assert len(told) == 1
    assert capfd.readouterr().err.splitlines() == [
        "warning: no connection can be accepted at the moment: Too many open files (said once a minute)"
    ]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_reads_nothing_is_closed(model, monkeypatch, stream):
    lost = threading.Event()

    def connection_lost(self, error, of_base=Connection.connection_lost):
        of_base(self, error)
        if self.flow.write_paused or self.transport.get_write_buffer_size() or self.stalled:
            lost.set()

    def end_stall(self, of_base=Connection._end_stall):
        self.stalled = True
        of_base(self)

    monkeypatch.setattr(Connection, "stalled", False, raising=False)
    monkeypatch.setattr(Connection, "connection_lost", connection_lost)
    monkeypatch.setattr(Connection, "_end_stall", end_stall)
    body = json.dumps({**LONG, "logprobs": 20, "stream": stream}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    limits = ConnectionLimits(4, 4, header_seconds=0.1, stall_seconds=0.1)
    with served(model, limits, send_buffer=4096) as address, socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        host, port = address.removeprefix("http://").split(":")
        deaf.connect((host, int(port)))
        deaf.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        lost.wait()
        wait_until(lambda: running(address) == 0)


def followed(model, run):
    """What ``run`` gives, with a service and a list to which the ends of its answers go."""
    ended = []

    async def main():
        service = model.new_service()
        try:
            return await run(service, lambda reply, first: ended.append(reply))
        finally:
            await asyncio.to_thread(service.close)

    return asyncio.run(main()), ended


PROMPT = EncodedPrompt([5, 6, 7], True)
ASK = Ask(PROMPT, GenerationConfig(max_new_tokens=400, loops=256, stop_ids=()), GenerationConfig())


def test_the_time_limit_holds_whether_or_not_anybody_reads(model):
    async def run(service, on_end):
        choices = await submit(service, [ASK, ASK], RequestLimits(0.05, 1 << 30), on_end)
        while not all(reply.error for reply in choices.replies):
            await asyncio.sleep(0.001)

    _, ended = followed(model, run)
    assert [type(reply.error) for reply in ended] == [CancelledError] * 2


def test_a_slow_reader_gets_fewer_and_larger_parts(model):
    short = Ask(
        PROMPT,
        GenerationConfig(max_new_tokens=100, stop_ids=(), logprobs=20, temperature=0.0),
        GenerationConfig(),
    )

    async def run(service, on_end):
        choices = await submit(service, [short], RequestLimits(60, 1 << 30), on_end)
        while choices.replies[0].result is None:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.01)
        return [came async for _, came in choices.follow()]

    (*parts, result), _ = followed(model, run)
    assert sum((part.token_ids for part in parts), ()) == result.token_ids
    assert sum((part.logprobs for part in parts), ()) == result.logprobs
    assert sum((part.loops for part in parts), ()) == result.loops_per_token
    assert "".join(part.text for part in parts) == result.text
    assert [len(part.token_ids) for part in parts] == [24, 24, 24, 24, 4]  # 512 log probabilities at most


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_gone_before_its_first_event_is_cancelled_and_counted(model, stream):
    app = make_app(model, ServeOptions("melt-tiny"))
    body = json.dumps({**LONG, "loops": 256, "stream": stream}).encode()
    scope = {
        **{"type": "http", "asgi": {"spec_version": "2.3", "version": "3.0"}, "http_version": "1.1", "method": "POST"},
        **{"path": "/v1/completions", "raw_path": b"/v1/completions", "query_string": b"", "root_path": ""},
        **{"headers": [(b"content-type", b"application/json")], "scheme": "http", "client": None, "server": None},
    }
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive():
        return messages.pop() if messages else {"type": "http.disconnect"}

    async def send(message):
        if message["type"] == "http.response.start" and stream:
            await asyncio.sleep(0)  # and the client is gone

    async def get(path):
        parts = []

        async def keep(message):
            parts.append(message.get("body", b""))

        await app.asgi({**scope, "method": "GET", "path": path, "raw_path": path.encode()}, wait_for_body, keep)
        return b"".join(parts).decode()

    async def wait_for_body():
        return {"type": "http.request", "body": b"", "more_body": False}

    async def main():
        async with app_running(app):
            with contextlib.suppress(Exception):
                await app.asgi(scope, receive, send)
            while "melt_answers_total{" not in (text := await get("/metrics")):  # counted once its slot is free
                await asyncio.sleep(0.001)
            return text

    assert 'melt_answers_total{end="CancelledError"} 1.0' in asyncio.run(main())


@contextlib.asynccontextmanager
async def app_running(app):
    """The application between the begin and the end of its event loop's lifespan."""
    incoming, outgoing = asyncio.Queue(), asyncio.Queue()
    task = asyncio.create_task(app.asgi({"type": "lifespan", "asgi": {}, "state": {}}, incoming.get, outgoing.put))
    await incoming.put({"type": "lifespan.startup"})
    assert (await outgoing.get())["type"] == "lifespan.startup.complete"
    yield
    await incoming.put({"type": "lifespan.shutdown"})
    await outgoing.get()
    await task
