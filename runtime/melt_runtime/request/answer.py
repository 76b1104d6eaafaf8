"""An answer's tokens to its text: without stop tokens, up to a stop string."""

from melt_runtime.request.settings import GenerationSettings
from melt_runtime.text.codec import StopMatcher, TextCodec


class AnswerText:
    """Takes token after token and gives the text that is safe to show.

    Attributes:
        stopped: whether a stop token or stop string ended it.
    """

    def __init__(self, codec: TextCodec, settings: GenerationSettings):
        self._decoder, self._stops = codec.stream(), StopMatcher(settings.stop)
        self._stop_ids = settings.stop_ids
        self.stopped = False

    def push(self, token: int) -> str:
        """Text that is safe to show with this token, sometimes none; sets ``stopped`` where the answer ends."""
        if token in self._stop_ids:
            self.stopped = True
            return ""
        piece = self._stops.push(self._decoder.push(token))
        self.stopped = self._stops.found is not None
        return piece

    def finish(self) -> str:
        """What was held back, when no more tokens come."""
        if self._stops.found is not None:
            return ""
        piece = self._stops.push(self._decoder.flush())
        self.stopped = self.stopped or self._stops.found is not None
        return piece + self._stops.flush()
