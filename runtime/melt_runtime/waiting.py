"""Requests that wait for a slot, and which of them enters next."""

from collections import Counter, deque
from collections.abc import Iterable, Iterator

from melt_runtime.reply import Reply


class Waiting:
    """Requests by submission: those that were submitted together take turns with other submissions, one at a time."""

    def __init__(self) -> None:
        self._replies: dict[object, deque[Reply]] = {}  # in the order of their turns

    @property
    def submissions(self) -> int:
        """Number of submissions of which a request waits."""
        return len(self._replies)

    def __len__(self) -> int:
        """Number of requests that wait."""
        return sum(map(len, self._replies.values()))

    def __iter__(self) -> Iterator[Reply]:
        """All of them."""
        return (reply for replies in self._replies.values() for reply in replies)

    def add(self, replies: Iterable[Reply]) -> None:
        """Adds requests that were submitted together."""
        for reply in replies:
            self._replies.setdefault(reply._group, deque()).append(reply)

    def take(self, running: Iterable[Reply], slots: int) -> Reply | None:
        """Takes the request that enters next, of the submission that has the fewest slots; of several such they take
        turns, the first come first. None where nothing may enter: a submission never has all of several slots.
        """
        taken = Counter(reply._group for reply in running)
        group = min(self._replies, key=lambda group: taken[group], default=None)
        if group is None or taken[group] >= max(1, slots - 1):
            return None
        replies = self._replies.pop(group)
        reply = replies.popleft()
        if replies:
            self._replies[group] = replies  # behind all others
        return reply

    def take_cancelled(self) -> list[Reply]:
        """Takes those that were cancelled."""
        gone = [reply for reply in self if reply._is_cancelled]
        for reply in gone:
            self._replies[reply._group].remove(reply)
            if not self._replies[reply._group]:
                del self._replies[reply._group]
        return gone

    def take_all(self) -> list[Reply]:
        """Takes every one."""
        gone = [*self]
        self._replies.clear()
        return gone
