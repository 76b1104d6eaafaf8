"""Tokens of one sequence that take their loops together: what a pass is made of."""

from collections.abc import Sequence
from dataclasses import dataclass

from melt_runtime.schedule.depth import Exit


@dataclass(slots=True, eq=False)
class Span:
    """A chunk of a prompt, or one token.

    Attributes:
        slot: whose tokens they are.
        start: position of the first, counted from 0: the cache row that its keys and values take.
        ids: token ids, at least one.
        depth: loops T that they are to take; fewer once ``exit`` has let them leave.
        loop: the next one, counted from 0; ``depth`` when they have taken all.
        exit: lets them leave before; None: nothing does.
        caches: of a LoopLM, the caches that hold them in the end: where they leave early, the last one is copied.
        is_wave: whether it is a token of a wave: others of its slot may be under way with it.
        is_plain: whether its rows of the cache are those of plain decoding. Not of MELT's waves of a short lag.
        row: over MELT's one cache, where it lies among the rows of its wave; -1: nowhere yet.
    """

    slot: int
    start: int
    ids: Sequence[int]
    depth: int
    loop: int = 0
    exit: Exit | None = None
    caches: int = 0
    is_wave: bool = False
    is_plain: bool = True
    row: int = -1

    def __post_init__(self) -> None:
        """Fills as many caches as loops, where no more are asked for."""
        self.caches = self.caches or self.depth

    def leave(self) -> None:
        """Takes no more loops."""
        self.depth = self.loop

    @property
    def is_chunk(self) -> bool:
        """Whether it is a chunk: it has its pass to itself, where single tokens of many slots share one."""
        return len(self.ids) > 1

    @property
    def is_done(self) -> bool:
        """Whether it has taken all its loops."""
        return self.loop == self.depth
