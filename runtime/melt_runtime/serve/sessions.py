"""Conversations in files of one folder, by names that reach nothing else."""

import contextlib
import re
import time
from pathlib import Path
from typing import Any

from melt_runtime.serve.errors import Fault, FaultError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_SUFFIX = ".melt-session"


class SessionFiles:
    """Files of saved conversations.

    Attributes:
        folder: where they lie; None: there are none.
    """

    def __init__(self, folder: Path | None):
        self.folder = folder

    def path(self, name: str) -> Path:
        """Where the conversation of a name lies, or would.

        Raises:
            FaultError: the server keeps none, or it is no name.
        """
        if self.folder is None:
            raise FaultError(
                Fault(404, "this server keeps no sessions: start it with --sessions DIR", code="no_sessions")
            )
        if _NAME.fullmatch(name) is None:
            rule = "letters, digits, - and _, 64 at most, the first no sign"
            raise FaultError(
                Fault(400, f"name must be of {rule}, got {name[:80]!r}", param="name", code="invalid_value")
            )
        return self.folder / f"{name}{_SUFFIX}"

    def existing(self, name: str) -> Path:
        """The same, of one that is there.

        Raises:
            FaultError: it is not, too.
        """
        path = self.path(name)
        if not path.is_file():
            raise FaultError(Fault(404, f"there is no session {name!r}", param="name", code="session_not_found"))
        return path

    def all(self) -> list[dict[str, Any]]:
        """Every one, by name."""
        self.path("any")
        assert self.folder is not None
        found = sorted(self.folder.glob(f"*{_SUFFIX}"))
        named = [path for path in found if _NAME.fullmatch(path.name.removesuffix(_SUFFIX))]
        described = []
        for path in named:
            with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
                described.append(self.describe(path))
        return described

    def describe(self, path: Path) -> dict[str, Any]:
        """One of them."""
        about = path.stat()
        return {
            "id": path.name.removesuffix(_SUFFIX),
            "object": "session",
            "created": int(about.st_mtime),
            "bytes": about.st_size,
            "age_seconds": max(0, int(time.time() - about.st_mtime)),
        }
