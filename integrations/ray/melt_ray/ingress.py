"""What clients reach: hands each request to the replica that its conversation prefers. Knows nothing of models."""

import asyncio
import json
from collections.abc import AsyncIterator

from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from melt_ray.exchange import Head, HttpRequest
from melt_ray.keys import conversation_key
from melt_runtime.serve.errors import Fault

_STREAM = b"text/event-stream"


class Ingress:
    """Passes requests on and answers back, and says so where an answer cannot be had."""

    def __init__(self, engine: DeploymentHandle, most_bytes: int, answer_seconds: float, by_conversation: bool):
        """Passes to ``engine``.

        Args:
            engine: the deployment that answers.
            most_bytes: of a body; what is longer is not read, and refused by the engine.
            answer_seconds: that the beginning of an answer may take, waiting for a replica included.
            by_conversation: whether turns of a conversation go to the same replica; else to the less busy of two.
        """
        self._engine = engine.options(method_name="answer", stream=True)
        self._most_bytes, self._seconds, self._by_conversation = most_bytes, answer_seconds, by_conversation

    async def __call__(self, request: Request) -> Response:
        """Answers one request; Ray cancels it where the client goes away, and with it what it asked for."""
        body = await self._read(request)
        headers = tuple(request.headers.raw)
        path = request.scope["path"].removeprefix(request.scope.get("root_path", "")) or "/"
        key = conversation_key(path, headers, body) if self._by_conversation else ""
        asked = HttpRequest(request.method, path, request.scope["query_string"], headers, body)
        answer = self._engine.options(session_id=key).remote(asked)
        try:
            async with asyncio.timeout(self._seconds):
                head = await anext(answer)
                first = await anext(answer, b"")  # before the status is sent: a replica lost meanwhile is an error
        except TimeoutError:
            answer.cancel()
            message = f"no replica began to answer within {self._seconds:g} s"
            return _respond(Fault(504, message, "server_error", code="timeout"))
        except asyncio.CancelledError:
            answer.cancel()
            raise
        except (RayError, RayServeException, StopAsyncIteration) as error:
            return _respond(_fault_of(error))
        response = StreamingResponse(self._rest(answer, head, first), head.status)
        response.raw_headers = list(head.headers)
        return response

    async def _read(self, request: Request) -> bytes:
        """The body, or as much of it as tells the engine that it is too long."""
        body = bytearray()
        async for piece in request.stream():
            body += piece
            if len(body) > self._most_bytes:
                break
        return bytes(body)

    async def _rest(
        self, answer: DeploymentResponseGenerator[Head | bytes], head: Head, first: bytes
    ) -> AsyncIterator[bytes]:
        """The body; where a replica is lost in the middle of a stream, an error is its last event."""
        is_stream = any(name == b"content-type" and value.startswith(_STREAM) for name, value in head.headers)
        try:
            yield first
            async for piece in answer:
                yield piece
        except (RayError, RayServeException) as error:
            if not is_stream:
                raise
            yield b"data: " + json.dumps(_fault_of(error).body).encode() + b"\n\n"
        finally:
            answer.cancel()


def _fault_of(error: Exception) -> Fault:
    """What a client is told of an answer that cannot be had."""
    if isinstance(error, BackPressureError):
        return Fault(429, "as many requests wait as may: ask again later", "rate_limit_error", code="queue_full")
    kind = type(error).__name__
    return Fault(503, f"the replica that answered was lost ({kind}): ask again", "server_error", code="replica_lost")


def _respond(fault: Fault) -> Response:
    return JSONResponse(fault.body, fault.status, fault.headers)
