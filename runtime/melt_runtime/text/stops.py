"""Stop strings in a stream of text. Knows nothing of tokens."""

from collections.abc import Sequence
from itertools import compress


class StopMatcher:
    """Finds stop strings in streamed text, also across pieces; holds back text that may become one.

    Attributes:
        found: the stop string that was found; None before.
    """

    def __init__(self, stops: Sequence[str]):
        self._stops = stops
        self._held = ""
        self._is_shown: list[bool] = []  # of each held character
        self.found: str | None = None

    def push(self, piece: str, is_shown: bool = True) -> str:
        """Text that is safe to show; nothing after ``found`` is set.

        Args:
            piece: the next text.
            is_shown: whether it is part of what is shown, or only looked through, as the name of a special token is.
        """
        text = self._held + piece
        shown = self._is_shown + [is_shown] * len(piece)
        hits = [(text.index(stop), stop) for stop in self._stops if stop in text]
        if hits:
            place, self.found = min(hits)
            self._held, self._is_shown = "", []
            return "".join(compress(text[:place], shown))
        place = len(text) - max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held, self._is_shown = text[place:], shown[place:]
        return "".join(compress(text[:place], shown))

    def flush(self) -> str:
        """The text held back, when no more comes."""
        text = "".join(compress(self._held, self._is_shown))
        self._held, self._is_shown = "", []
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop``."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
