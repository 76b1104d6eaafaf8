"""Wave decoding: consecutive tokens of one sequence under way at once, each some loops behind the one before.

A token predicts the next one after each of its loops, not only after the last. The next one starts from the first such
draft, and again from a better one as soon as a deeper loop changes it; what the last loop says is the truth. So a token
costs as many passes as its prediction takes to settle, and the weights are read once for all that are under way
(LoopSpec, arXiv 2609.17184, and WaveFront, arXiv 2609.23033, do so with a cache for each loop).
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from melt_runtime.schedule.depth import Depth
from melt_runtime.schedule.span import Span


@dataclass
class Drafts:
    """What became of the tokens that started before they were known.

    Attributes:
        made: how many were started; those under way when the answer ends were neither kept nor dropped.
        kept: how many were right in the end.
        corrected: how many were dropped, by the loop after which the token said so that they built on.
    """

    made: int = 0
    kept: int = 0
    corrected: Counter[int] = field(default_factory=Counter)


NOTHING = -1
"""What a token says whose logits are not numbers: none is started from that."""


@dataclass(eq=False)
class _Token:
    """A token under way.

    Attributes:
        span: where it stands.
        said: the token that its last loop says comes next.
        may_leave: whether the rule of adaptive depth has let it leave.
        is_over: whether it takes no more loops, and was read since.
    """

    span: Span
    said: int = NOTHING
    may_leave: bool = False
    is_over: bool = False


class Wave:
    """The tokens of one sequence that are under way, oldest first.

    Attributes:
        drafts: what became of those that started as drafts.
    """

    def __init__(self, slot: int, depth: Depth, lag: int, most: int, caches_per_loop: bool = False):
        """Begins empty.

        Args:
            slot: of the sequence.
            depth: of every token.
            lag: loops of a token after which the next one may start.
            most: tokens under way at once.
            caches_per_loop: whether a token that is done waits apart until those before it are. Over MELT's one cache
                the tokens of a pass are neighbours: there it takes loops until it is the oldest.
        """
        self._slot, self._depth, self._lag, self._most = slot, depth, lag, most
        self._waits_apart = caches_per_loop
        self._tokens: list[_Token] = []
        self.drafts = Drafts()

    @property
    def spans(self) -> list[Span]:
        """All that are under way; the first is known to be right, the others are drafts."""
        return [token.span for token in self._tokens]

    @property
    def running(self) -> list[Span]:
        """Those of them that take another loop."""
        return [span for span in self.spans if not span.is_done]

    def start(self, position: int, token_id: int) -> None:
        """Starts from a token that is known, where nothing is under way."""
        assert not self._tokens
        self._add(position, token_id)

    def advance(
        self, predict: Callable[[Span, list[int]], int], leaves: Callable[[Span], bool], last: int
    ) -> list[tuple[Span, int]]:
        """Reads what a pass over ``running`` left, corrects drafts, starts the next one.

        Args:
            predict: called with a span and the tokens after the known one up to it; the token that its logits give
                next, or ``NOTHING``.
            leaves: whether the rule of adaptive depth lets a span leave now; asked once after each of its loops.
            last: the last position that may be started.

        Returns:
            The tokens that are final now, each with the one that follows it, oldest first; they are under way no more.
        """
        path: list[int] = []
        for place, token in enumerate(self._tokens):
            if not token.is_over:
                token.said = predict(token.span, path)
                token.may_leave |= leaves(token.span)
                if token.may_leave and (place == 0 or self._waits_apart):
                    token.span.leave()
            if place + 1 < len(self._tokens) and self._tokens[place + 1].span.ids[0] != token.said:
                self.drafts.corrected[token.span.loop] += len(self._tokens) - place - 1
                del self._tokens[place + 1 :]
            token.is_over = token.span.is_done
            path = [*path, token.said]
        final = self._take_final()
        newest = self._tokens[-1] if self._tokens else None
        if newest is not None and self._may_follow(newest, last):
            self._add(newest.span.start + 1, newest.said)
            self.drafts.made += 1
        return final

    def _may_follow(self, newest: _Token, last: int) -> bool:
        has_room = len(self._tokens) < self._most and newest.span.start < last
        return has_room and newest.said != NOTHING and (newest.is_over or newest.span.loop >= self._lag)

    def _take_final(self) -> list[tuple[Span, int]]:
        """Ends the oldest tokens that are over, as far as they follow each other."""
        final = []
        while self._tokens and self._tokens[0].is_over:
            token = self._tokens.pop(0)
            final.append((token.span, token.said))
            if self._tokens:
                oldest = self._tokens[0]
                self.drafts.kept += 1
                if oldest.may_leave:
                    oldest.span.leave()
                    oldest.is_over = True
        return final

    def _add(self, position: int, token_id: int) -> None:
        is_plain = self._waits_apart or self._lag >= self._depth.most - 1
        span = Span(self._slot, position, [token_id], self._depth.most, exit=self._depth.exit())
        span.is_wave, span.is_plain = True, is_plain
        self._tokens.append(_Token(span))
