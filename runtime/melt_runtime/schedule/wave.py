"""Wave decoding: consecutive tokens of one sequence in one pass, each some loops behind the one before.

A token predicts the next one after each of its loops, not only after the last. The next one starts from the first such
draft, and again from a better one as soon as a deeper loop changes it; what the last loop says is the truth. So a token
costs as many passes as its prediction takes to settle, and the weights are read once for all that are under way
(LoopSpec, arXiv 2609.17184, and WaveFront, arXiv 2609.23033, do so with a cache for each loop).
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from melt_runtime.schedule.span import Span


@dataclass
class Drafts:
    """What became of the tokens that started before they were known.

    Attributes:
        made: how many were started.
        kept: how many were right in the end.
        corrected: how many were replaced, by the loop of the token before that said so.
    """

    made: int = 0
    kept: int = 0
    corrected: Counter[int] = field(default_factory=Counter)


class Wave:
    """The tokens of one sequence that are under way, oldest first.

    Attributes:
        spans: each of one token, at consecutive positions; the first token is known to be right, the others are drafts.
        drafts: what became of those.
    """

    def __init__(self, slot: int, loops: int, lag: int, most: int):
        """Begins empty.

        Args:
            slot: of the sequence.
            loops: depth T of every token.
            lag: loops of a token after which the next one may start.
            most: tokens under way at once.
        """
        self._slot, self._loops, self._lag = slot, loops, lag
        self._most = most
        self.spans: list[Span] = []
        self.drafts = Drafts()

    def start(self, position: int, token: int) -> None:
        """Starts from a token that is known, where nothing is under way."""
        assert not self.spans
        self.spans = [Span(self._slot, position, [token], self._loops)]

    def advance(self, predict: Callable[[int, list[int]], int], room: int) -> int | None:
        """Reads what a pass left, corrects drafts, starts the next one.

        Args:
            predict: called with a place in ``spans``, and the tokens after the known one up to it; the token that its
                logits give next.
            room: positions that may still be started after the oldest.

        Returns:
            The token after the oldest, once that took all its loops; it is then the oldest no more.
        """
        path: list[int] = []
        for place, span in enumerate(self.spans):
            token = predict(place, path)
            if place + 1 < len(self.spans):
                if self.spans[place + 1].ids[0] != token:
                    self.drafts.corrected[span.loop] += 1
                    del self.spans[place + 1 :]
                    break
                path = [*path, token]
        oldest, newest = self.spans[0], self.spans[-1]
        self.drafts.kept += oldest.is_done and len(self.spans) > 1
        if newest.loop >= self._lag and len(self.spans) < min(self._most, room + 1):
            self.spans.append(Span(self._slot, newest.start + 1, [token], self._loops))
            self.drafts.made += not newest.is_done
        if not oldest.is_done:
            return None
        del self.spans[0]
        return self.spans[0].ids[0] if self.spans else token
