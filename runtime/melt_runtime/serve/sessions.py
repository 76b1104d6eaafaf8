"""Conversations in files of one folder, by names that reach nothing else."""

import contextlib
import os
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from melt_files import matching
from melt_runtime.errors import MeltError
from melt_runtime.serve.errors import Fault, FaultError, fault_of

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_SUFFIX = ".melt-session"


class SessionFiles:
    """Files of saved conversations.

    Attributes:
        folder: where they lie; None: there are none.
    """

    def __init__(self, folder: Path | None):
        self.folder = folder
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def one(self, name: str, exists: bool) -> Iterator[Path]:
        """The file of one conversation; no other operation of this server on the folder takes place in the block.

        Args:
            name: of the conversation.
            exists: whether the file must exist.

        Raises:
            FaultError: there is no such session, no such name, or what the block raised: the file disappeared, cannot
                be read or written, or holds no session of this model.
        """
        path = self.path(name)
        with self._lock:
            try:
                if exists and not path.is_file():
                    raise FileNotFoundError(name)
                if not exists and os.path.lexists(path) and (path.is_symlink() or not path.is_file()):
                    message = f"the session {name!r} cannot be stored: the folder holds something else by its name"
                    raise FaultError(Fault(409, message, param="name", code="session_unusable"))
                if not exists:
                    os.stat(path.parent)
                yield path
            except OSError as error:
                if exists and isinstance(error, FileNotFoundError):
                    raise _missing(name) from error
                message = f"the session {name!r} cannot be stored: {error.strerror or type(error).__name__}"
                raise FaultError(Fault(507, message, "server_error", code="storage_error")) from error
            except MeltError as error:
                if isinstance(error.__cause__, FileNotFoundError):
                    raise _missing(name) from error
                fault = fault_of(error)  # the message names the file, whose place is not the client's business
                raise FaultError(replace(fault, message=fault.message.replace(str(path), name))) from error

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

    def all(self) -> list[dict[str, Any]]:
        """Every one, by name."""
        self.path("any")
        assert self.folder is not None
        found = matching(self.folder, f"*{_SUFFIX}")
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


def _missing(name: str) -> FaultError:
    return FaultError(Fault(404, f"there is no session {name!r}", param="name", code="session_not_found"))
