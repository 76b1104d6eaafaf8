"""Clients that go away while their request is at work."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from fastapi import Request

from melt_runtime.serve.errors import Fault, FaultError

_T = TypeVar("_T")


async def unless_gone(request: Request, work: Coroutine[Any, Any, _T]) -> _T:
    """What ``work`` gives, which is left where the client of the request goes away.

    Raises:
        FaultError: it went away.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(wait_until_gone(request))
    gone.add_done_callback(lambda _: task.cancel())
    try:
        return await task
    except asyncio.CancelledError:
        if not gone.done():
            raise
        raise FaultError(Fault(503, "the client went away", "server_error", code="cancelled")) from None
    finally:
        gone.cancel()


async def wait_until_gone(request: Request) -> None:
    """Until the client of a request, whose body was read, goes away."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
