"""Compiles the grammars of requests on threads of their own, so that requests without a grammar never wait for one."""

import asyncio
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from melt_runtime.errors import QueueError
from melt_runtime.model import MeltModel
from melt_runtime.request.grammar import Grammar, GrammarPart, Grammars

_T = TypeVar("_T")
_THREADS, _MAX_WAITING = 16, 128


class Compiler:
    """The grammars of one server; llguidance is started for the first one."""

    def __init__(self, model: MeltModel):
        """Takes the model whose tokens the grammars allow."""
        self._model = model
        self._grammars: Grammars | None = None
        self._lock = threading.Lock()
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

    def compile(self, parts: Sequence[GrammarPart]) -> Grammar:
        """As ``Grammars.compile_parts``; from any thread.

        Raises:
            GrammarError, QueueError: as there, and where this bundle cannot have grammars.
        """
        with self._lock:
            if self._grammars is None:
                stop_ids = tuple(self._model.defaults.stop_ids or ())
                self._grammars = Grammars(self._model.codec, self._model.manifest.model.vocab_size, stop_ids)
        return self._grammars.compile_parts(parts)

    def close(self) -> None:
        """Ends the processes of grammars."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            if self._grammars is not None:
                self._grammars.close()
