"""Continuous batching by loop: every pass takes one loop of as many sequences as can share it.

A token of a deep request and one of a shallow request go side by side, each at its own loop; a request leaves when it
is done, and the next one enters at any pass. What must have a pass to itself, a loop of a prompt's chunk or of a wave
over MELT's one cache, takes every second one, in turns, so that nobody waits for it longer than that.
"""

from collections.abc import Sequence

from melt_runtime.schedule.span import Span


class Batched:
    """Chooses the spans of each next pass; one sequence alone is served as it comes.

    Attributes:
        mixes_loops: whether one pass can hold tokens at different loops. Where the graph is told its number, tokens
            that begin together stay together until the deepest is done.
        shares_cache: whether one cache serves all loops, so that a wave has its passes to itself.
    """

    def __init__(self, mixes_loops: bool, shares_cache: bool):
        self.mixes_loops, self.shares_cache = mixes_loops, shares_cache
        self._apart_is_next = True
        self._last_apart = -1

    def next(self, requests: Sequence[Sequence[Span]]) -> Sequence[Span]:
        """Spans that take one loop each in one pass: one chunk, one wave, or single tokens.

        Args:
            requests: what each request is to run next, in the order in which they came; at least one.
        """
        if len(requests) == 1:
            return requests[0]
        apart = [spans for spans in requests if self._is_apart(spans[0])]
        steps = [span for spans in requests if not self._is_apart(spans[0]) for span in spans]
        if apart and (self._apart_is_next or not steps):
            self._apart_is_next = False
            return self._choose(apart)
        self._apart_is_next = True
        begun = [span for span in steps if span.loop]
        return steps if self.mixes_loops else begun or steps

    def _is_apart(self, span: Span) -> bool:
        return span.is_chunk or (span.is_wave and self.shares_cache)

    def _choose(self, apart: list[Sequence[Span]]) -> Sequence[Span]:
        """One of those that need a pass to themselves, slot after slot."""
        chunks = [spans for spans in apart if spans[0].is_chunk]
        # One chunk is in flight at a time: the one that has begun goes on.
        chunk = next((spans for spans in chunks if spans[0].loop), chunks[0] if chunks else None)
        turns = sorted((spans for spans in apart if spans is chunk or spans not in chunks), key=lambda s: s[0].slot)
        chosen = next((spans for spans in turns if spans[0].slot > self._last_apart), turns[0])
        self._last_apart = chosen[0].slot
        return chosen
