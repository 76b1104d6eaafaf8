"""The folder that makes a second load fast: prepacked graphs, and which bundles were already found undamaged.

Everything in it can be deleted at any time and is made again. Processes share it: entries appear by renaming a complete
folder, and disappear whole. Knows files, not graphs.
"""

import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from melt_runtime.manifest import Manifest

DEFAULT_LIMIT = 16 << 30
"""Bytes that the folder may take; the entries unused for longest go first."""
MIN_BYTES = 64 << 20
"""Bundles with fewer bytes of weights load as quickly without help."""

_STAMP = "entry.json"
_ABANDONED_SECONDS = 24 * 3600


@dataclass(frozen=True)
class CacheEntry:
    """One prepacked graph: its folder, what it was made from, its bytes, when it was last used (seconds since 1970)."""

    folder: Path
    source: str
    nbytes: int
    last_used: float


class LoadCache:
    """A cache folder.

    Attributes:
        folder: made when something is first kept.
        limit: bytes that it may take.
        min_bytes: weights from which a bundle is worth an entry.
    """

    def __init__(self, folder: Path | None = None, limit: int | None = None, min_bytes: int = MIN_BYTES):
        """Chooses the folder.

        Args:
            folder: default: ``MELT_CACHE_DIR``, or ``melt-onnx`` in the system's folder for caches.
            limit: default: ``MELT_CACHE_GB`` times 10^9, or 16 GiB.
            min_bytes: see above.

        Raises:
            ValueError: ``MELT_CACHE_GB`` is not a number.
        """
        self.folder = _default_folder() if folder is None else folder
        self.limit = _default_limit() if limit is None else limit
        self.min_bytes = min_bytes

    def find(self, key: str) -> Path | None:
        """The folder of an entry, marked as used; None where there is none, or files of another size or time."""
        folder = self.folder / key
        stamp = folder / _STAMP
        try:
            recorded = json.loads(stamp.read_text(encoding="utf-8"))["files"]
            whole = recorded == _signatures(folder)
            os.utime(stamp)
        except (OSError, ValueError, KeyError, TypeError):
            whole = False
        return folder if whole else None

    @contextmanager
    def making(self, key: str, source: str) -> Iterator[Path]:
        """A new folder that becomes the entry ``key`` if the block ends well and it is still wanted.

        Args:
            key: name of the entry.
            source: what it is made from, for people.

        Raises:
            OSError: the folder cannot be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        making = Path(tempfile.mkdtemp(prefix=f".{key}.", suffix=".partial", dir=self.folder))
        try:
            yield making
            values = {"source": source, "files": _signatures(making)}
            (making / _STAMP).write_text(json.dumps(values), encoding="utf-8")
            if self.find(key) is None:
                shutil.rmtree(self.folder / key, ignore_errors=True)  # damaged
                with suppress(OSError):  # another process was faster: its entry serves as well
                    making.rename(self.folder / key)
        finally:
            shutil.rmtree(making, ignore_errors=True)
        self._prune(keep=key)

    def entries(self) -> list[CacheEntry]:
        """Every entry, the most recently used first."""
        found = []
        for stamp in self.folder.glob(f"*/{_STAMP}"):
            with suppress(OSError, ValueError, KeyError):
                source = json.loads(stamp.read_text(encoding="utf-8"))["source"]
                nbytes = sum(path.stat().st_size for path in stamp.parent.iterdir())
                found.append(CacheEntry(stamp.parent, source, nbytes, stamp.stat().st_mtime))
        return sorted(found, key=lambda entry: -entry.last_used)

    def clear(self) -> int:
        """Deletes everything; returns the bytes that were freed."""
        freed = sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())
        if self.folder.is_dir():
            shutil.rmtree(self.folder)
        return freed

    def unchanged(self, bundle: Path, manifest: Manifest) -> frozenset[str]:
        """Files of a bundle that were found undamaged before and have had the same size, time and place since."""
        try:
            known = json.loads(self._checked(bundle).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return frozenset()
        return frozenset(
            name
            for name, entry in manifest.files.items()
            if (bundle / name).is_file() and known.get(name) == [entry.sha256, *_signature(bundle / name)]
        )

    def remember(self, bundle: Path, manifest: Manifest) -> None:
        """Notes that every file of a bundle was just found undamaged.

        Raises:
            OSError: the folder cannot be written.
        """
        values = {name: [entry.sha256, *_signature(bundle / name)] for name, entry in manifest.files.items()}
        path = self._checked(bundle)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as stream:
            json.dump(values, stream)
        Path(stream.name).replace(path)

    def _checked(self, bundle: Path) -> Path:
        name = hashlib.sha256(str(bundle.resolve()).encode()).hexdigest()[:32]
        return self.folder / "checked" / f"{name}.json"

    def _prune(self, keep: str) -> None:
        """Deletes the entries unused for longest while there are too many bytes, and what crashed processes left."""
        entries = self.entries()
        total = sum(entry.nbytes for entry in entries)
        for entry in reversed(entries):
            if total <= self.limit:
                break
            if entry.folder.name != keep:
                shutil.rmtree(entry.folder, ignore_errors=True)
                total -= entry.nbytes
        for left in self.folder.glob(".*.partial"):
            with suppress(OSError):
                if time.time() - left.stat().st_mtime > _ABANDONED_SECONDS:
                    shutil.rmtree(left, ignore_errors=True)


def _signatures(folder: Path) -> dict[str, list[int]]:
    """Size and time of every file of an entry."""
    return {path.name: _signature(path) for path in sorted(folder.iterdir()) if path.name != _STAMP}


def _signature(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ino]


def _default_folder() -> Path:
    chosen = os.environ.get("MELT_CACHE_DIR")
    if chosen:
        return Path(chosen)
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "melt-onnx"


def _default_limit() -> int:
    chosen = os.environ.get("MELT_CACHE_GB")
    if chosen is None:
        return DEFAULT_LIMIT
    try:
        return int(float(chosen) * 1e9)
    except ValueError:
        raise ValueError(f"MELT_CACHE_GB must be a number of gigabytes, got {chosen!r}") from None
