"""The server's side of ``grammar_process``: starts the program, and talks to the process of each grammar."""

import contextlib
import json
import os
import pickle
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

from melt_runtime.errors import QueueError
from melt_runtime.request import grammar_process
from melt_runtime.request.grammar_process import BUSY, FAILED, MASK, REFUSED, SINGLE, receive, send, unpack_reply

HAS_FORK = hasattr(os, "fork") and hasattr(socket, "send_fds")
_WALL_SECONDS = 20.0
"""Time limit of one message, for a process that waits rather than computes; a loaded machine is given time."""
_START_SECONDS = 120.0
"""Time limit for loading a vocabulary."""


class GrammarError(ValueError):
    """A grammar that cannot be compiled, that costs more than it may, or that an answer cannot follow."""


class ProcessEndedError(Exception):
    """The process of a grammar ended: it crashed, or reached a limit."""


@dataclass(frozen=True)
class Setup:
    """What every process of a bundle's grammars knows.

    Attributes:
        tokens: bytes of every token.
        special_ids: tokens that are not text.
        stop_ids: tokens that end an answer.
        limits: llguidance's limits on one grammar.
        json_options: llguidance's options of JSON schemas.
        memory_bytes: memory that one grammar may use.
        wall_seconds: time limit of one message.
    """

    tokens: list[bytes]
    special_ids: list[int]
    stop_ids: list[int]
    limits: dict[str, Any]
    json_options: dict[str, Any]
    memory_bytes: int
    wall_seconds: float = _WALL_SECONDS

    @property
    def message(self) -> bytes:
        """The first message to a process."""
        return pickle.dumps(self.__dict__)


class Channel:
    """Messages to the process of one grammar and back. One thread at a time; the process ends with the channel."""

    def __init__(
        self, reader: IO[bytes], writer: IO[bytes], owner: Any, process: subprocess.Popen[bytes] | None = None
    ):
        """Takes the streams, and what closes with them.

        Args:
            reader: replies.
            writer: messages.
            owner: the socket that the streams belong to, if any.
            process: the process, where it has no limits of its own.
        """
        self._reader, self._writer, self._process = reader, writer, process
        self._lock = threading.Lock()
        self.is_open = True
        self.close = weakref.finalize(
            self, _close, [one for one in (owner, writer, reader) if one is not None], process
        )

    def ask(self, values: dict[str, Any]) -> tuple[int, float, bytes]:
        """The reply to a message: its kind, its seconds of processor time, its content.

        Raises:
            ProcessEndedError: there is none.
        """
        with self._lock:
            timer = threading.Timer(values["seconds"] + 1, self._process.kill) if self._process is not None else None
            if timer is not None:
                timer.start()
            try:
                send(self._writer, json.dumps(values).encode())
                payload = receive(self._reader)
            except (OSError, ValueError):  # ValueError: the channel was closed
                payload = None
            finally:
                if timer is not None:
                    timer.cancel()
            if payload is None:
                self._end()
        return unpack_reply(payload)

    def _end(self) -> NoReturn:
        self.is_open = False
        self.close()
        raise ProcessEndedError


class GrammarHost:
    """Opens a process for each grammar. Its methods may be called from any thread."""

    def __init__(self, setup: Setup, has_fork: bool = HAS_FORK):
        """Starts nothing yet.

        Args:
            setup: for every process.
            has_fork: whether one process loads the vocabulary and forks for each grammar.
        """
        self._setup, self._has_fork = setup, has_fork
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._end: Any = None

    def open(self) -> Channel:
        """A process of its own for one grammar.

        Raises:
            GrammarError: llguidance refuses the vocabulary.
            QueueError: it cannot be started now, for want of descriptors, memory or time.
        """
        try:
            with self._lock:
                return self._fork() if self._has_fork else self._spawn()
        except OSError as error:
            raise QueueError(f"the process of a grammar cannot be started ({error}); retry later") from error

    def close(self) -> None:
        """Ends the process that forks; those of grammars end with their channels."""
        with self._lock:
            if self._end is not None:
                self._end()
                self._process = None

    def _fork(self) -> Channel:
        for attempt in (1, 2):
            if self._process is None or self._process.poll() is not None:
                self._start()
            assert self._control is not None
            ours, theirs = socket.socketpair()
            with theirs:
                try:
                    socket.send_fds(self._control, [b"\0"], [theirs.fileno()])
                except OSError:
                    ours.close()
                    self._process = None  # it has ended: start another one
                    if attempt == 2:
                        raise
                    continue
            ours.settimeout(2 * self._setup.wall_seconds)
            return Channel(ours.makefile("rb"), ours.makefile("wb"), ours)
        raise AssertionError("unreachable")

    def _start(self) -> None:
        if self._end is not None:
            self._end()
        ours, theirs = socket.socketpair()
        with ExitStack() as failing:
            failing.enter_context(ours)
            with theirs:
                process = _run([str(theirs.fileno())], pass_fds=[theirs.fileno()])
            self._end = weakref.finalize(self, _close, (ours,), process)
            ours.settimeout(_START_SECONDS)
            with ours.makefile("rb") as reader, ours.makefile("wb") as writer:
                self._require_started(reader, writer)
            failing.pop_all()
        self._process, self._control = process, ours

    def _spawn(self) -> Channel:
        process = _run([SINGLE], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert process.stdin is not None
        assert process.stdout is not None
        channel = Channel(process.stdout, process.stdin, None, process)
        timer = threading.Timer(_START_SECONDS, process.kill)
        timer.start()
        try:
            self._require_started(process.stdout, process.stdin)
        finally:
            timer.cancel()
        return channel

    def _require_started(self, reader: Any, writer: Any) -> None:
        send(writer, self._setup.message)
        payload = receive(reader)
        if payload is None:
            raise OSError("it ended while it loaded the vocabulary")
        kind, _, content = unpack_reply(payload)
        if kind == FAILED:
            raise GrammarError(f"llguidance cannot use this bundle's tokenizer: {content.decode()}")


def _run(arguments: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(
        [sys.executable, "-P", str(Path(grammar_process.__file__)), *arguments],
        start_new_session=True,  # Ctrl-C in a terminal ends the server, and the server ends its processes
        **{**streams, **options},
    )


def _close(streams: Sequence[Any], process: subprocess.Popen[bytes] | None) -> None:
    """Closes what a process listens to, which ends it."""
    for stream in streams:
        with contextlib.suppress(OSError, ValueError):
            if isinstance(stream, socket.socket):
                stream.shutdown(socket.SHUT_RDWR)  # wakes a thread that waits for a reply
        with contextlib.suppress(OSError, ValueError):
            stream.close()
    if process is not None:
        process.kill()
        process.wait()


__all__ = ["BUSY", "FAILED", "MASK", "REFUSED", "Channel", "GrammarError", "GrammarHost", "ProcessEndedError", "Setup"]
