"""What stands in a folder that other processes may remove at any time."""

from pathlib import Path


def matching(folder: Path, pattern: str) -> list[Path]:
    """The paths in ``folder`` that match ``pattern``, sorted; none where the folder is missing, or just went.

    Raises:
        OSError: it cannot be read.
    """
    try:
        return sorted(folder.glob(pattern))
    except FileNotFoundError:  # Python 3.11 and 3.12: removed between glob's own check and its reading
        return []
