"""How many connections a server holds, and for how long one may say nothing or read nothing.

A connection waits for its client until a request has arrived whole, and again once the answer is written. Where there
are too many, the one that has waited longest is closed for the new one, first of those that never sent a request; where
all are at work, the new one is closed.
"""

import ipaddress
import os
import sys
import time
from asyncio import TimerHandle, Transport
from dataclasses import dataclass
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

if sys.platform != "win32":
    import resource

_MAX_CONNECTIONS = 1024
_RESERVED = 128
"""Descriptors for files, and for connections that are accepted and not counted yet."""
_LEAST = 8
_LOG_SECONDS = 60.0
_MAX_PIECES = 1 << 14
"""Maximum number of pieces (chunks, or what comes at a time) of a body: each costs the event loop microseconds."""
_MAX_AHEAD = 1 << 16
"""Maximum number of bytes that a client may send while its request is answered. They are read so that the client's
end is seen."""


@dataclass(frozen=True)
class ConnectionLimits:
    """Limits on the connections of a server.

    Attributes:
        total: maximum number of open connections.
        per_address: maximum number from one address: of IPv6, from one /64 network. A reverse proxy is one address.
        header_seconds: time limit for a request's headers, from the connection's begin or the end of the last answer.
        stall_seconds: time after which a connection is closed whose client reads nothing of what was written.
    """

    total: int
    per_address: int
    header_seconds: float = 10.0
    stall_seconds: float = 30.0

    @classmethod
    def for_process(cls, requests: int, answer_seconds: float) -> "ConnectionLimits":
        """The limits for so many requests at a time, within the descriptors that this process may open.

        Args:
            requests: running and waiting.
            answer_seconds: time limit of an answer: a client that reads nothing does not get more.
        """
        total = max(_LEAST, min(_MAX_CONNECTIONS + requests, _free_descriptors() - _RESERVED))
        return cls(total, max(1, total // 2), stall_seconds=min(cls.stall_seconds, answer_seconds))


class RareLog:
    """A line on stderr, at most once a minute: strangers decide how often there is a reason."""

    def __init__(self) -> None:
        self._last = float("-inf")

    def __call__(self, message: str) -> None:
        """Prints ``message``, or nothing."""
        if time.monotonic() - self._last >= _LOG_SECONDS:
            self._last = time.monotonic()
            print(f"warning: {message} (said once a minute)", file=sys.stderr, flush=True)


class Connections:
    """The open connections of a server.

    Attributes:
        limits: how many, and for how long.
    """

    def __init__(self, limits: ConnectionLimits):
        self.limits = limits
        self._log = RareLog()
        # Ordered by when each began to wait for its client, the longest first.
        self._all: dict[Connection, None] = {}
        self._by_address: dict[str, dict[Connection, None]] = {}

    def admit(self, connection: "Connection") -> bool:
        """Counts a new connection; False where it is one too many."""
        peers = self._by_address.setdefault(connection.address, {})
        crowds = ((peers, self.limits.per_address, "from one address"), (self._all, self.limits.total, "in all"))
        for crowd, limit, where in crowds:
            if len(crowd) < limit:
                continue
            self._log(f"{limit} connections {where}, as many as are allowed: idle ones are closed for new ones")
            idle = next((other for other in crowd if other.cycle is None), None)  # it has never asked
            idle = idle or next((other for other in crowd if other.is_waiting), None)
            if idle is None:
                self.discard(connection)
                return False
            self.discard(idle)
            idle.transport.abort()
        self._by_address.setdefault(connection.address, {})[connection] = (
            None  # the discarded one may have been its last
        )
        self._all[connection] = None
        return True

    def touch(self, connection: "Connection") -> None:
        """Counts a connection as the one that began to wait last."""
        for crowd in (self._all, self._by_address.get(connection.address, {})):
            if connection in crowd:
                del crowd[connection]
                crowd[connection] = None

    def discard(self, connection: "Connection") -> None:
        """Counts a connection as closed."""
        self._all.pop(connection, None)
        peers = self._by_address.get(connection.address, {})
        peers.pop(connection, None)
        if not peers:
            self._by_address.pop(connection.address, None)


class _Parser(h11.Connection):
    """Refuses bodies of too many pieces."""

    _pieces = 0

    def next_event(self) -> Any:
        """As h11's.

        Raises:
            RemoteProtocolError: the body has too many pieces.
        """
        event = super().next_event()
        if isinstance(event, h11.Data):
            self._pieces += 1
            if self._pieces > _MAX_PIECES:
                raise h11.RemoteProtocolError("too many pieces")
        elif isinstance(event, h11.Request):
            self._pieces = 0
        return event


class Connection(H11Protocol):
    """A connection that is closed where its client sends no headers, or reads nothing, in time.

    Attributes:
        address: of the client, as far as it counts for the limit.
    """

    def __init__(self, connections: Connections, **options: Any):
        super().__init__(**options)
        self.conn = _Parser(h11.SERVER)
        self.address = ""
        self._ahead = 0
        self._connections, self._limits = connections, connections.limits
        self._timer: TimerHandle | None = None
        self._stall_timer: TimerHandle | None = None
        self._unsent = 0

    @property
    def is_waiting(self) -> bool:
        """Whether no request is at work: none has arrived whole, or its answer is written."""
        return self.cycle is None or self.cycle.response_complete or self.cycle.more_body

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]  # as uvicorn's
        """Begins, or is closed at once."""
        super().connection_made(transport)
        self.address = _network(self.client[0] if self.client else "")
        if self._connections.admit(self):
            self._expect_headers()
        else:
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Ends."""
        self._connections.discard(self)
        for timer in (self._timer, self._stall_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Reads what came. Only whole headers end the wait for them: a byte now and then does not."""
        is_answering = self.cycle is not None and not self.cycle.response_complete and not self.cycle.more_body
        super().data_received(data)
        self._watch()
        if not is_answering or self.transport.is_closing():
            return
        self._ahead += len(data)
        if self._ahead > _MAX_AHEAD:
            self.transport.abort()
        else:
            self.flow.resume_reading()

    def send_400_response(self, msg: str) -> None:
        """Refuses what is no HTTP; an answer under way ends, and says nothing more."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:
            self.transport.abort()

    def on_response_complete(self) -> None:
        """Waits for the next request."""
        self._ahead = 0
        self._expect_headers()  # before a request that is there already begins
        self._connections.touch(self)
        super().on_response_complete()
        self._watch()

    def pause_writing(self) -> None:
        """Stops writing until the client has read."""
        super().pause_writing()
        self._watch_stall()

    def resume_writing(self) -> None:
        """Writes again."""
        super().resume_writing()
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None

    def _expect_headers(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_later(self._limits.header_seconds, self._end_wait)

    def _watch(self) -> None:
        """Ends the wait for headers once they are there."""
        has_headers = self.cycle is not None and not self.cycle.response_complete
        if has_headers and self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _end_wait(self) -> None:
        self._timer = None
        if self.transport.get_write_buffer_size():  # of the last answer: slow is not stalled
            self._watch_stall()
        else:
            self.transport.abort()

    def _watch_stall(self) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
        self._unsent = self.transport.get_write_buffer_size()
        self._stall_timer = self.loop.call_later(self._limits.stall_seconds, self._end_stall)

    def _end_stall(self) -> None:
        self._stall_timer = None
        size = self.transport.get_write_buffer_size()
        if size >= self._unsent:
            self.transport.abort()
        elif self.flow.write_paused:
            self._watch_stall()
        else:
            self._expect_headers()


def _network(address: str) -> str:
    """What counts as one address."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.ipv4_mapped is not None:
            return str(parsed.ipv4_mapped)
        return str(ipaddress.ip_network((parsed, 64), strict=False))
    return str(parsed)


def _free_descriptors() -> int:
    """Descriptors that this process may still open."""
    if sys.platform == "win32":
        return _MAX_CONNECTIONS
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return sys.maxsize
    try:
        return int(soft) - len(os.listdir("/dev/fd"))
    except OSError:
        return int(soft) - _RESERVED
