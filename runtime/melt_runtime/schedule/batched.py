"""Continuous batching by loop: every pass takes one loop of as many sequences as can share it.

A token of a deep request and one of a shallow request go side by side, each at its own loop; a request leaves when it
is done, and the next one enters at any pass. A prompt takes one loop of one chunk between two passes of tokens, so that
nobody waits for it longer than that.
"""

from collections.abc import Sequence

from melt_runtime.schedule.span import Span


class Batched:
    """Chooses the spans of each next pass; one sequence alone is served as it comes.

    Attributes:
        mixes_loops: whether one pass can hold tokens at different loops. Where each loop has a cache of its own, or the
            graph is told its number, tokens that begin together stay together until the deepest is done.
    """

    def __init__(self, mixes_loops: bool):
        self.mixes_loops = mixes_loops
        self._chunk_is_next = True

    def next(self, spans: Sequence[Span]) -> Sequence[Span]:
        """Spans that take one loop each in one pass: one chunk, or single tokens of different slots.

        Args:
            spans: what each request is to run next, in the order in which the requests came; at least one.
        """
        if len(spans) == 1:
            return spans
        steps = [span for span in spans if not span.is_chunk]
        if len(steps) < len(spans) and (self._chunk_is_next or not steps):
            self._chunk_is_next = False
            chunks = [span for span in spans if span.is_chunk]
            # One chunk is in flight at a time: the one that has begun goes on.
            return [next((chunk for chunk in chunks if chunk.loop), chunks[0])]
        self._chunk_is_next = True
        if self.mixes_loops:
            return steps
        begun = [span for span in steps if span.loop]
        return begun or steps
