"""The program that compiles and follows grammars: a process for each, so that none can crash or delay anything else.

The server starts it once, by its path. It loads the vocabulary and then forks: each fork serves one grammar over a
socket of its own, within limits of processor time, wall time and memory, and ends with the socket, or at a limit. Where
there is no fork, the server starts it once for each grammar and talks to it over its standard streams.

It imports nothing of ``melt_runtime``, so that a process costs milliseconds and holds no model.
"""

import json
import os
import pickle
import signal
import socket
import struct
import sys
import time
from typing import IO, Any

MASK, REFUSED, FAILED, BUSY = 0, 1, 2, 3
"""Kinds of replies: a mask; a token that the grammar does not allow; an error, with its text; no process is left."""
SINGLE = "--single"
"""Argument: serve one grammar over the standard streams."""
_LENGTH, _REPLY = struct.Struct("<I"), struct.Struct("<Bd")
_TOP = '%llguidance {"no_forcing": true}\nstart: @'
"""Lark before every grammar: where only one text can follow, every token that begins it is allowed. llguidance would
tokenize the text and allow the first token of that, whose bytes need not be the text's (normalizers, added tokens)."""


def send(stream: IO[bytes], payload: bytes) -> None:
    """Writes one message."""
    stream.write(_LENGTH.pack(len(payload)) + payload)
    stream.flush()


def receive(stream: IO[bytes]) -> bytes | None:
    """Reads one message; None at the end of the stream."""
    head = stream.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack(head)
    payload = stream.read(length)
    return payload if len(payload) == length else None


def unpack_reply(payload: bytes) -> tuple[int, float, bytes]:
    """The kind of a reply, the seconds of processor time that it took, and its content."""
    kind, seconds = _REPLY.unpack_from(payload)
    return kind, seconds, payload[_REPLY.size :]


class _Tokens:
    """What llguidance asks of a tokenizer.

    Attributes:
        tokens: bytes of every token.
        special_token_ids: tokens that are not text.
        eos_token_id: a token that ends an answer.
    """

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, setup: dict[str, Any]):
        self.tokens: list[bytes] = setup["tokens"]
        self.special_token_ids: list[int] = setup["special_ids"]
        self.eos_token_id: int = setup["stop_ids"][0]

    def __call__(self, text: str) -> list[int]:
        """Never called: no grammar forces tokens."""
        raise NotImplementedError


class _Compiler:
    """llguidance over one tokenizer."""

    def __init__(self, setup: dict[str, Any]):
        import llguidance

        self._library: Any = llguidance
        self._setup = setup
        self._tokenizer = self._library.LLTokenizer(_Tokens(setup), eos_token=setup["stop_ids"])

    def compile(self, parts: list[tuple[str, str, str]]) -> Any:
        """A matcher of the first part, which may refer to the others by ``@name``.

        Raises:
            ValueError: not a grammar.
        """
        matcher = self._library.LLMatcher
        top = {"name": "", "lark_grammar": _TOP + parts[0][0]}
        grammars = [top, *(self._grammar(matcher, *part) for part in parts)]
        limits = self._library.LLParserLimits(**self._setup["limits"])
        made = matcher(self._tokenizer, json.dumps({"grammars": grammars}), log_level=0, limits=limits)
        if not made.is_error():
            made.deep_copy().compute_bitmask()
        if made.is_error():
            raise ValueError(made.get_error())
        return made

    def _grammar(self, matcher: Any, name: str, kind: str, source: str) -> dict[str, Any]:
        if kind == "json_schema":
            made = json.loads(matcher.grammar_from_json_schema(source, self._setup["json_options"]))
            return {**made["grammars"][0], "name": name}
        if kind == "regex":
            return {**json.loads(matcher.grammar_from_regex(source))["grammars"][0], "name": name}
        return {"name": name, "lark_grammar": source}


class _Answers:
    """The answers that follow one grammar, each by its number."""

    def __init__(self, matcher: Any):
        self._matcher = matcher
        self._open: dict[int, Any] = {}

    def forget(self, numbers: list[int]) -> None:
        """Frees answers that have ended."""
        for number in numbers:
            self._open.pop(number, None)

    def follow(self, number: int, drop: int, add: list[int]) -> tuple[int, bytes]:
        """The mask of the next token, after ``drop`` tokens were taken back and others added."""
        if number not in self._open:
            self._open[number] = self._matcher.deep_copy()
        matcher = self._open[number]
        if drop and not matcher.rollback(drop):
            return self._failed(number)
        for place, token in enumerate(add):
            if not matcher.is_error() and matcher.try_consume_tokens([token]) != 1:
                return self._failed(number) if matcher.is_error() else (REFUSED, _LENGTH.pack(place))
        mask = b"" if matcher.is_error() else matcher.compute_bitmask()
        return self._failed(number) if matcher.is_error() else (MASK, mask)

    def _failed(self, number: int) -> tuple[int, bytes]:
        return FAILED, str(self._open.pop(number).get_error()).encode()


class _Limits:
    """Ends this process where one message takes too long, or too much memory."""

    def __init__(self, memory_bytes: int, wall_seconds: float):
        self._wall_seconds = wall_seconds
        self._has_timers = hasattr(signal, "setitimer")
        if not self._has_timers:  # the server ends the process instead
            return
        import resource

        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if os.path.exists("/proc/self/statm"):
            with open("/proc/self/statm") as file:
                used = int(file.read().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + memory_bytes, used + memory_bytes))

    def start(self, seconds: float) -> None:
        """Begins to count: so many seconds of processor time."""
        if self._has_timers:
            signal.setitimer(signal.ITIMER_REAL, self._wall_seconds)
            signal.setitimer(signal.ITIMER_PROF, seconds)

    def stop(self) -> None:
        """Ends it."""
        if self._has_timers:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.setitimer(signal.ITIMER_PROF, 0)


def _serve(compiler: _Compiler, setup: dict[str, Any], reader: IO[bytes], writer: IO[bytes]) -> None:
    """Compiles the grammar of the first message, then answers one message after another."""
    limits = _Limits(setup["memory_bytes"], setup["wall_seconds"])
    answers: _Answers | None = None
    while (message := receive(reader)) is not None:
        values = json.loads(message)
        limits.start(values["seconds"])
        began = time.thread_time()  # exact also while a timer runs, which that of the process is not
        if answers is None:
            try:
                answers = _Answers(compiler.compile(values["parts"]))
                kind, content = MASK, b""
            except ValueError as error:
                kind, content = FAILED, str(error).encode("utf-8", "replace")
        else:
            answers.forget(values["ended"])
            kind, content = answers.follow(values["answer"], values["drop"], values["add"])
        limits.stop()
        send(writer, _REPLY.pack(kind, time.thread_time() - began) + content)


def _serve_forks(control: socket.socket) -> None:
    """Loads the vocabulary, then serves a grammar over every socket that comes."""
    stream = control.makefile("wb")
    head = control.recv(_LENGTH.size, socket.MSG_WAITALL)
    if len(head) < _LENGTH.size:
        return
    setup = pickle.loads(control.recv(_LENGTH.unpack(head)[0], socket.MSG_WAITALL))
    try:
        compiler = _Compiler(setup)
    except BaseException as error:  # a panic of llguidance is no Exception
        send(stream, _REPLY.pack(FAILED, 0.0) + str(error).encode("utf-8", "replace"))
        return
    send(stream, _REPLY.pack(MASK, 0.0))
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # forks that ended leave nothing
    while True:
        message, sockets, _, _ = socket.recv_fds(control, 1, 1)
        if not message:
            return
        channel = socket.socket(fileno=sockets[0])
        try:
            is_fork = os.fork() == 0
        except OSError:
            channel.sendall(_LENGTH.pack(_REPLY.size) + _REPLY.pack(BUSY, 0.0))
            is_fork = False
        if is_fork:
            try:
                control.close()
                _serve(compiler, setup, channel.makefile("rb"), channel.makefile("wb"))
            finally:
                os._exit(0)  # the server sees the end of the stream, whatever it was
        channel.close()


def _main() -> None:
    if sys.argv[1] != SINGLE:
        _serve_forks(socket.socket(fileno=int(sys.argv[1])))
        return
    reader, writer = sys.stdin.buffer, sys.stdout.buffer
    message = receive(reader)
    if message is not None:
        setup = pickle.loads(message)
        try:
            compiler = _Compiler(setup)
        except BaseException as error:
            send(writer, _REPLY.pack(FAILED, 0.0) + str(error).encode("utf-8", "replace"))
            return
        send(writer, _REPLY.pack(MASK, 0.0))
        _serve(compiler, setup, reader, writer)


if __name__ == "__main__":
    _main()
