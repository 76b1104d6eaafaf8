"""Tokens of one sequence that take their loops together: what a pass is made of."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(slots=True, eq=False)
class Span:
    """A chunk of a prompt, or one token.

    Attributes:
        slot: whose tokens they are.
        start: position of the first, counted from 0: the cache row that its keys and values take.
        ids: token ids, at least one.
        depth: loops T that they are to take.
        loop: the next one, counted from 0; ``depth`` when they have taken all.
    """

    slot: int
    start: int
    ids: Sequence[int]
    depth: int
    loop: int = 0

    @property
    def is_chunk(self) -> bool:
        """Whether it is a chunk: it has its pass to itself, where single tokens of many slots share one."""
        return len(self.ids) > 1

    @property
    def is_done(self) -> bool:
        """Whether it has taken all its loops."""
        return self.loop == self.depth
