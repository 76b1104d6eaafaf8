"""What can go wrong, as one small tree.

    MeltError
    ├── BundleError      a bundle that is missing, damaged, of another schema, or made for something else
    ├── CapacityError    more tokens than the state was allocated for
    ├── ProviderError    an execution provider that was asked for and cannot run
    ├── TokenError       text or token ids that the model cannot take
    ├── RunError         ONNX Runtime gave up in the middle: a graph that computes something else, or no memory left
    ├── NumericalError   the model computed NaN or infinity
    ├── BusyError        a session, stream or runner that is at work already
    ├── ClosedError      a model that was closed
    ├── StreamError      a stream that cannot go on, or has no result
    ├── QueueError       a service that takes no more requests now
    ├── CancelledError   a request that was cancelled before its end
    ├── SavedError       a saved session that is damaged, or another model's
    └── BatchError       prompts of a batch that could not be answered, after those that could

Beside it: arguments outside their rule raise ``ValueError`` with field, rule and value; a disk or file that refuses
raises ``OSError``. ``melt_models`` has trees of its own, ``CheckpointError`` and ``TrainingError``: it does not know
the runtime.
"""

from collections.abc import Mapping
from typing import Any

_SHOWN = 8


class MeltError(Exception):
    """Base of what the runtime and the exporter raise on purpose, but for ``ValueError`` and ``OSError``."""


class BundleError(MeltError):
    """A bundle cannot be used; the message lists every fault and how to make a good one."""


class CapacityError(MeltError):
    """More tokens than the state holds; nothing was computed or changed."""


class ProviderError(MeltError):
    """The execution provider cannot run here; the message names what is missing."""


class TokenError(MeltError):
    """An empty prompt, unknown token ids, or text that the tokenizer cannot encode."""


class RunError(MeltError):
    """ONNX Runtime stopped with an error; the state holds what stood in it before, or part of what was computed."""


class NumericalError(MeltError):
    """The model gave NaN or infinity: its weights are damaged, or its precision is too low for it."""


class BusyError(MeltError):
    """Something serves one call at a time and is at work; nothing was computed or changed by this one."""


class ClosedError(MeltError):
    """A model was closed: it has no session of its own any more, and makes no others."""


class StreamError(MeltError, RuntimeError):
    """A stream whose conversation went on without it, or whose result was asked for before its end."""


class QueueError(MeltError):
    """A service has as many requests as it takes, or is closing; nothing was computed or changed."""


class CancelledError(MeltError):
    """A request of a service that was cancelled, by its caller or since the service was closed."""


class SavedError(MeltError):
    """A file holds no session that this model can go on with; nothing was changed."""


class BatchError(MeltError):
    """Prompts of a batch that could not be answered; the others were.

    Attributes:
        errors: what was wrong with each, by the prompt's number.
        results: the other answers by number, where they were not given out before.
    """

    def __init__(self, errors: Mapping[int, Exception], results: Mapping[int, Any] | None = None):
        self.errors = dict(errors)
        self.results = dict(results or {})
        shown = [f"prompt {number}: {error}" for number, error in sorted(self.errors.items())[:_SHOWN]]
        more = [f"and {len(errors) - _SHOWN} more"] if len(errors) > _SHOWN else []
        super().__init__("\n  ".join([f"{len(errors)} of the prompts could not be answered:", *shown, *more]))


def without_frames(error: Exception) -> Exception:
    """An error that keeps no prompt in memory, as the frames that it came through do."""
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)
