"""The tokens of one conversation, how they were divided into chunks, and how much of that the cache still holds.

Numbers depend on the division: inside a chunk tokens see each other at the same loop, earlier chunks at their last. So
tokens count as cached only where the cache holds what running them would give, bit for bit. Knows no text.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from melt_runtime.loop import LoopRunner
from melt_runtime.state import Array


@dataclass(frozen=True)
class Snapshot:
    """A conversation at one moment.

    Attributes:
        ids: its tokens.
        depths: of those that were run, where a chunk began the loops that it went through, else 0; [n] int16.
    """

    ids: list[int]
    depths: Array


class TokenHistory:
    """The tokens of one sequence.

    The last token of an answer was chosen but not run. Of those that were, the cache holds all but the last few, where
    a turn that failed wrote over them; these are run again, in the same chunks, before the conversation goes on.

    Attributes:
        ids: every token, prompts and answers; replaced, never changed, when a turn begins.
        turn: counts what began or was undone, so that a stream knows whether the conversation is still the one it was
            made for.
    """

    def __init__(self, runner: LoopRunner):
        self._runner = runner
        self._lost: Array = np.zeros(0, dtype=np.int16)
        self.ids: list[int] = []
        self.turn = 0

    @property
    def cached(self) -> int:
        """Tokens whose final keys and values are in the cache."""
        return int(self._runner.state.lengths[0])

    def continues(self, prompt: Sequence[int]) -> bool:
        """Whether ``prompt`` begins with the whole conversation and brings a token that was not run yet."""
        ran = self.cached + len(self._lost)
        return len(prompt) > ran and list(prompt[: len(self.ids)]) == self.ids

    def reusable(self, prompt: Sequence[int], loops: int) -> int:
        """Cached tokens that a fresh cache would hold just so after ``prompt`` at this depth.

        The prompt's last token never counts, since its logits are needed.
        """
        limit = min(self.cached, len(prompt) - 1)
        shared = next((place for place in range(limit) if self.ids[place] != prompt[place]), limit)
        return self._runner.state.full_chunks(shared, loops)

    def snapshot(self) -> Snapshot:
        """The conversation as it is."""
        return Snapshot(self.ids, np.concatenate((self._runner.state.depths[0, : self.cached], self._lost)))

    def begin(self, prompt: Sequence[int], kept: int | None) -> None:
        """Makes ``prompt`` the conversation.

        Args:
            prompt: token ids.
            kept: cached tokens that stay; None: the prompt continues the conversation, and all of them do.
        """
        self.turn += 1
        if kept is not None:
            self._runner.state.truncate(kept)
            self._lost = self._lost[:0]
        self.ids = list(prompt)

    def lost_chunks(self) -> Iterator[tuple[list[int], int]]:
        """Tokens and loops of each chunk that the cache has lost, to be run before anything else."""
        while len(self._lost):
            loops = int(self._lost[0])
            later = np.flatnonzero(self._lost[1:])
            size = int(later[0]) + 1 if later.size else len(self._lost)
            start = self.cached
            yield self.ids[start : start + size], loops
            self._lost = self._lost[size:]

    def undo(self, before: Snapshot, kept: int) -> None:
        """Makes the conversation what it was.

        Args:
            before: taken before the turn began.
            kept: cached tokens that the turn left alone.
        """
        self.turn += 1
        self._runner.state.truncate(min(kept, self.cached))
        self.ids = before.ids
        self._lost = before.depths[self.cached :]

    def leave(self) -> None:
        """Ends a turn early: its last token counts as chosen but not run."""
        self._runner.state.truncate(min(self.cached, len(self.ids) - 1))

    def forget(self) -> None:
        """Makes the conversation empty; the memory stays allocated."""
        self.turn += 1
        self._runner.state.reset()
        self.ids = []
        self._lost = self._lost[:0]
