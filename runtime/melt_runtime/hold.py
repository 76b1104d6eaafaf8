"""One at a time: who is at work on buffers that serve a single call. Knows nothing of models."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from melt_runtime.errors import BusyError


class Hold:
    """Taken by one owner at a time, whatever thread it comes from; nobody waits, a second one is refused.

    Attributes:
        owner: who holds it; None while nobody does.
    """

    def __init__(self, message: str):
        """Keeps what a refused caller is told."""
        self.owner: object | None = None
        self._message = message
        self._guard = threading.Lock()

    def require_free(self) -> None:
        """Refuses to go on while somebody is at work.

        Raises:
            BusyError: it is held.
        """
        if self.owner is not None:
            raise BusyError(self._message)

    def take(self, owner: object) -> None:
        """Makes ``owner`` the holder.

        Raises:
            BusyError: it is held.
        """
        with self._guard:
            self.require_free()
            self.owner = owner

    def free(self, owner: object) -> None:
        """Ends what ``owner`` holds, if it does. Takes no lock, so that a garbage collection may call it anywhere."""
        if self.owner is owner:
            self.owner = None

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Holds it for a block.

        Raises:
            BusyError: it is held.
        """
        owner = object()
        try:
            self.take(owner)
            yield
        finally:
            self.free(owner)
