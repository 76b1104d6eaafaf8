"""What this package raises on purpose, without a framework: ``melt-export --help`` and its like need none."""

from collections.abc import Sequence

_MOST, _LONGEST = 40, 400  # faults, characters of one


class CheckpointError(Exception):
    """A checkpoint folder that cannot be loaded; the message lists every fault found.

    Attributes:
        faults: each of them, a sentence that begins with its file; empty where one sentence says it all.
    """

    def __init__(self, message: str, faults: Sequence[str] = ()):
        super().__init__(message + list_faults(faults))
        self.faults = tuple(faults)


def list_faults(faults: Sequence[str]) -> str:
    """Faults as lines of a message; of very many the first ones and their number."""
    more = [f"and {len(faults) - _MOST} more"] if len(faults) > _MOST else []
    lines = [*faults[:_MOST], *more]
    return "".join(f"\n  {line if len(line) <= _LONGEST else line[:_LONGEST] + '...'}" for line in lines)


def missing_package(error: ModuleNotFoundError, command: str, extra: str) -> str:
    """The sentence for a package that is not installed.

    Args:
        error: what importing it raised.
        command: that needs it.
        extra: of this distribution that brings it.
    """
    package = (error.name or str(error)).partition(".")[0]
    return f"{command} needs {package}, which is not installed: pip install 'melt-onnx[{extra}]'"
