"""The grammars of one model: llguidance is looked for, and started, with the first one."""

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from melt_runtime.text.codec import TextCodec

if TYPE_CHECKING:  # what runs its process is not imported before a grammar is asked for
    from melt_runtime.request.grammar import Grammar, GrammarKind, GrammarPart, GrammarProcessor, Grammars


class GrammarCompiler:
    """Compiles grammars over one model's tokens; from any thread."""

    def __init__(self, codec: TextCodec, vocab_size: int, stop_ids: Sequence[int]):
        """Starts nothing yet; arguments as for ``Grammars``."""
        self._codec, self._vocab_size, self._stop_ids = codec, vocab_size, stop_ids
        self._grammars: Grammars | None = None
        self._lock = threading.Lock()

    def compile(self, parts: "Sequence[GrammarPart]") -> "Grammar":
        """As ``Grammars.compile_parts``.

        Raises:
            GrammarError, QueueError: as there, and where this bundle cannot have grammars.
        """
        from melt_runtime.request.grammar import Grammars

        with self._lock:
            if self._grammars is None:
                self._grammars = Grammars(self._codec, self._vocab_size, self._stop_ids)
        return self._grammars.compile_parts(parts)

    def processor(self, kind: "GrammarKind", source: str) -> "GrammarProcessor":
        """What keeps one answer to a grammar of this kind; of a schema everything is enforced.

        Raises:
            GrammarError, QueueError: as for ``compile``.
        """
        from melt_runtime.request.grammar import GrammarPart

        return self.compile([GrammarPart("answer", kind, source, strict=True, label=kind)]).processor()

    def close(self) -> None:
        """Ends the processes; answers that follow a grammar fail."""
        with self._lock:
            if self._grammars is not None:
                self._grammars.close()
