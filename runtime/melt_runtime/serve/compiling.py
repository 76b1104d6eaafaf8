"""Compiles the grammars of requests on threads of their own, so that requests without a grammar never wait for one."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from melt_runtime.errors import QueueError
from melt_runtime.request.grammar_compiler import GrammarCompiler

_T = TypeVar("_T")
_THREADS, _MAX_WAITING = 16, 128


class Compiler:
    """Compiles the grammars of one server."""

    def __init__(self, grammars: GrammarCompiler):
        """Takes those of its model."""
        self.compile = grammars.compile
        self._grammars = grammars
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="melt-grammar")
        self._waiting = 0

    async def run(self, function: Callable[[], _T]) -> _T:
        """The result of a function that compiles grammars.

        Raises:
            QueueError: too many requests wait for theirs.
        """
        if self._waiting >= _MAX_WAITING:
            raise QueueError(f"too many grammars to compile ({self._waiting} requests waiting); retry later")
        self._waiting += 1  # on the event loop, like all that reads it
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, function)
        finally:
            self._waiting -= 1

    def close(self) -> None:
        """Ends the processes of grammars."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._grammars.close()
