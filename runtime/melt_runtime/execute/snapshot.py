"""A sequence at one moment: what is kept while a turn may be undone, and in files."""

from dataclasses import dataclass

from melt_runtime.memory.plan import Array


@dataclass(frozen=True)
class Snapshot:
    """A sequence at one moment.

    Attributes:
        ids: its tokens.
        depths: of those that were run, as ``Slot.depths``; [n] int16.
        caches: of a LoopLM, how many hold them.
    """

    ids: list[int]
    depths: Array
    caches: int
