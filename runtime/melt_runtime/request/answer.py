"""An answer's tokens to its text: without stop tokens, up to a stop string."""

from collections.abc import Sequence

from melt_runtime.request.settings import GenerationSettings
from melt_runtime.text.codec import TextCodec
from melt_runtime.text.stops import StopMatcher


class AnswerText:
    """Takes token after token and gives the text that is safe to show.

    Attributes:
        stopped: whether a stop token or stop string ended the answer.
    """

    def __init__(self, codec: TextCodec, settings: GenerationSettings, context: Sequence[int] = ()):
        """Starts an answer.

        Args:
            codec: the model's tokenizer.
            settings: stop strings and stop tokens.
            context: token ids of the prompt; the answer's first token keeps the space that separates it from them.
        """
        self._codec, self._stop_ids = codec, settings.stop_ids
        self._decoder = codec.stream(context)
        # Special tokens are not part of the text, so stop strings with their names are looked for in a text of its own.
        self._named = codec.special_stops(settings.stop)
        self._stops = StopMatcher(settings.stop)
        self.stopped = False

    def push(self, token: int) -> str:
        """Text that is safe to show with this token, sometimes none; sets ``stopped`` where the answer ends."""
        if token in self._stop_ids:
            self.stopped = True
            return ""
        name = self._codec.special_name(token)
        if name is None:
            return self._checked(self._named.push(self._decoder.push(token)))
        return self._checked(self._named.push(name, is_shown=False))

    def finish(self) -> str:
        """The text held back, when no more tokens come."""
        if self._named.found is None and self._stops.found is None:
            piece = self._checked(self._named.push(self._decoder.flush()))
            if self._stops.found is None and self._named.found is None:
                piece += self._checked(self._named.flush())
        else:
            piece = ""
        return piece if self._stops.found is not None else piece + self._stops.flush()

    def _checked(self, piece: str) -> str:
        """What of a piece comes before a stop string."""
        piece = self._stops.push(piece)
        self.stopped = self.stopped or self._named.found is not None or self._stops.found is not None
        return piece
