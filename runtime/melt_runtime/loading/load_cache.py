"""The folder that makes a second load fast: prepacked graphs, and which bundles were already found undamaged.

Everything in it can be deleted at any time and is made again. Processes share it: entries appear and disappear by
renaming a complete folder. Where the folder cannot be written, what it holds still serves. Knows files, not graphs.

    CACHEDIR.TAG            says to backups that this is a cache, and to us that we made the folder
    {32 hex digits}/        an entry, with entry.json
    checked/{...}.json      the files of one bundle that were found undamaged
"""

import errno
import hashlib
import json
import math
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from melt_files import Partial, matching, partial_folder, partials, remove_dead, replace_text
from melt_runtime.arguments import instance, path_of, shown, whole_number
from melt_runtime.bundle.manifest import Manifest

DEFAULT_LIMIT = 16 << 30
"""Bytes that the folder may take; the entries unused for longest go first."""
MIN_BYTES = 64 << 20
"""Bundles with fewer bytes of weights load as quickly without help."""

_MOST_GB = 9e9  # not yet 2^63 bytes
_STAMP = "entry.json"
_CHECKED = "checked"
_TAG = "CACHEDIR.TAG"
_TAG_TEXT = "Signature: 8a477f597d28d172789f06886806bc55\n# made by melt-onnx; see https://bford.info/cachedir/\n"
_MAKER = "melt-onnx"
_KEY = re.compile(r"[0-9a-f]{32}")
_NOTE = re.compile(r"[0-9a-f]{32}\.json")


@dataclass(frozen=True)
class CacheEntry:
    """One prepacked graph: its folder, what it was made from, its bytes, when it was last used (seconds since 1970)."""

    folder: Path
    source: str
    nbytes: int
    last_used: float


@dataclass(frozen=True)
class Cleared:
    """What deleting all entries came to.

    Attributes:
        freed: bytes.
        left: what still lies in the folder: not ours, or in use.
    """

    freed: int
    left: tuple[Path, ...]


class LoadCache:
    """A cache folder.

    Attributes:
        folder: made when something is first kept.
        limit: bytes that it may take.
        min_bytes: weights from which a bundle is worth an entry.
    """

    def __init__(
        self, folder: str | os.PathLike[str] | None = None, limit: int | None = None, min_bytes: int = MIN_BYTES
    ):
        """Chooses the folder.

        Args:
            folder: default: ``MELT_CACHE_DIR``, or ``melt-onnx`` in the system's folder for caches.
            limit: default: ``MELT_CACHE_GB`` times 10^9, or 16 GiB.
            min_bytes: see above.

        Raises:
            ValueError: an argument, ``MELT_CACHE_GB`` or ``MELT_CACHE_DIR`` is outside its rule.
        """
        self.folder = _default_folder() if folder is None else path_of("folder", folder)
        try:
            self.folder.exists()
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:  # all else may be a disk's trouble, and costs the cache only
                raise ValueError(f"folder must have a shorter name, got {shown(str(self.folder))}") from error
        self.limit = _default_limit() if limit is None else whole_number("limit", limit, 0, sys.maxsize)
        self.min_bytes = whole_number("min_bytes", min_bytes, 0, sys.maxsize)

    def find(self, key: str) -> Path | None:
        """The folder of an entry, marked as used; None where there is none, or files of another size or time.

        Raises:
            ValueError: ``key`` is not 32 hexadecimal digits.
        """
        folder = self._entry(key)
        stamp = _read_stamp(folder)
        try:
            whole = stamp is not None and stamp.get("files") == _signatures(folder)
        except OSError:
            whole = False
        if whole:
            with suppress(OSError):  # it may be read, not written: then nobody here deletes by last use either
                os.utime(folder / _STAMP)
        return folder if whole else None

    @contextmanager
    def making(self, key: str, source: str) -> Iterator[Path]:
        """A new folder that becomes the entry ``key`` if the block ends well and it is still wanted.

        Args:
            key: name of the entry, 32 hexadecimal digits.
            source: what it is made from, for people.

        Raises:
            OSError: the folder cannot be written.
            ValueError: ``key`` is another name.
        """
        entry = self._entry(key)
        with partial_folder(self.folder, key, self.make_folder) as making:
            yield making
            values = {"made_by": _MAKER, "source": source, "files": _signatures(making)}
            (making / _STAMP).write_text(json.dumps(values), encoding="utf-8")
            making.chmod(0o755)
            if self.find(key) is None:
                self.remove(key)  # damaged
                with suppress(OSError):  # another process was faster: its entry serves as well
                    making.rename(entry)
        self._prune(keep=key)

    def remove(self, key: str) -> None:
        """Deletes an entry: it is gone at once, its bytes a moment later. One that cannot be deleted stays.

        Raises:
            ValueError: ``key`` is not 32 hexadecimal digits.
        """
        folder = self._entry(key)
        with suppress(OSError):
            if folder.exists():
                with partial_folder(self.folder, key, self.make_folder) as place:
                    folder.rename(place / key)

    def entries(self) -> list[CacheEntry]:
        """Every entry, the most recently used first."""
        found = []
        for folder in matching(self.folder, "*"):
            stamp = _read_stamp(folder)
            if stamp is None:
                continue
            with suppress(OSError):  # deleted meanwhile
                source, used = str(stamp.get("source")), (folder / _STAMP).stat().st_mtime
                found.append(CacheEntry(folder, source, folder_bytes(folder), used))
        return sorted(found, key=lambda entry: -entry.last_used)

    def partials(self) -> list[Partial]:
        """Entries that are being made, and what processes left that died while they made one."""
        return [*partials(self.folder), *partials(self.folder / _CHECKED)]

    def clear(self) -> Cleared:
        """Deletes what this class put into the folder, and the folder if it made that too and nothing else is there.

        Links are not followed; entries that are being made now stay.
        """
        before = folder_bytes(self.folder)
        remove_dead(self.folder)
        for entry in self.entries():
            self.remove(entry.folder.name)
        checked = self.folder / _CHECKED
        if not checked.is_symlink():
            remove_dead(checked)
            for note in matching(checked, "*.json"):
                if _NOTE.fullmatch(note.name) and _read_own(note) is not None:
                    with suppress(OSError):
                        note.unlink()
            with suppress(OSError):
                checked.rmdir()
        tag = self.folder / _TAG
        left = tuple(path for path in matching(self.folder, "*") if path != tag)
        with suppress(OSError):
            if not left and tag.read_text(encoding="utf-8") == _TAG_TEXT:
                tag.unlink()
                try:
                    self.folder.rmdir()
                except OSError:  # another process began to make an entry: the folder stays, and stays marked
                    if self.folder.is_dir():
                        replace_text(tag, _TAG_TEXT)
        return Cleared(before - folder_bytes(self.folder), left)

    def unchanged(self, bundle: str | os.PathLike[str], manifest: Manifest) -> frozenset[str]:
        """Files of a bundle that were found undamaged before and have had the same size, time and place since.

        Raises:
            ValueError: an argument of a wrong type.
        """
        bundle, manifest = _bundle(bundle, manifest)
        note = _read_own(self._checked(bundle))
        known = None if note is None else note.get("files")
        if not isinstance(known, dict):
            return frozenset()
        return frozenset(
            name
            for name, entry in manifest.files.items()
            if (bundle / name).is_file() and known.get(name) == [entry.sha256, *_signature(bundle / name)]
        )

    def remember(self, bundle: str | os.PathLike[str], manifest: Manifest) -> None:
        """Notes that every file of a bundle was just found undamaged.

        Raises:
            OSError: the folder cannot be written, or a file of the bundle not be found.
            ValueError: an argument of a wrong type.
        """
        bundle, manifest = _bundle(bundle, manifest)
        files = {name: [entry.sha256, *_signature(bundle / name)] for name, entry in manifest.files.items()}
        text = json.dumps({"made_by": _MAKER, "source": str(bundle), "files": files})
        replace_text(self._checked(bundle), text, self._make_checked)

    def make_folder(self) -> None:
        """Makes the folder, marked as ours, where it is missing.

        Raises:
            OSError: it cannot be made.
        """
        if not self.folder.is_dir():
            self.folder.mkdir(parents=True, exist_ok=True)
            replace_text(self.folder / _TAG, _TAG_TEXT)

    def _make_checked(self) -> None:
        self.make_folder()
        with suppress(FileNotFoundError):  # the folder was removed meanwhile: it is made again
            (self.folder / _CHECKED).mkdir(exist_ok=True)

    def _entry(self, key: str) -> Path:
        """Where an entry lies: a key with a path in it would lead out of the folder."""
        if not isinstance(key, str) or not _KEY.fullmatch(key):
            raise ValueError(f"key must be 32 hexadecimal digits in lower case, got {shown(key)}")
        return self.folder / key

    def _checked(self, bundle: Path) -> Path:
        name = hashlib.sha256(os.fsencode(bundle.resolve())).hexdigest()[:32]
        return self.folder / _CHECKED / f"{name}.json"

    def _prune(self, keep: str) -> None:
        """Deletes the entries unused for longest while there are too many bytes; those in the making count."""
        entries = self.entries()
        total = sum(entry.nbytes for entry in entries) + sum(folder_bytes(part.folder) for part in self.partials())
        for entry in reversed(entries):
            if total <= self.limit:
                break
            if entry.folder.name != keep:
                self.remove(entry.folder.name)
                total -= entry.nbytes


def _bundle(bundle: object, manifest: object) -> tuple[Path, Manifest]:
    """A bundle as a caller names it.

    Raises:
        ValueError: an argument of a wrong type.
    """
    return path_of("bundle", bundle), instance("manifest", manifest, Manifest, "a Manifest")


def folder_bytes(folder: Path) -> int:
    """Bytes of the files in a folder, as far as they are still there; links are not followed."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                total += os.lstat(os.path.join(place, name)).st_size
    return total


def _read_stamp(folder: Path) -> dict[str, Any] | None:
    """What an entry says of itself; None for any other folder, or a link."""
    if not _KEY.fullmatch(folder.name) or folder.is_symlink():
        return None
    return _read_own(folder / _STAMP)


def _read_own(path: Path) -> dict[str, Any] | None:
    """A JSON object that this class wrote, or None."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) and values.get("made_by") == _MAKER else None


def _signatures(folder: Path) -> dict[str, list[int]]:
    """Size and time of every file of an entry."""
    return {path.name: _signature(path) for path in sorted(folder.iterdir()) if path.name != _STAMP}


def _signature(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ino]


def _default_folder() -> Path:
    chosen = os.environ.get("MELT_CACHE_DIR")
    if chosen is not None:
        if not chosen or (os.path.lexists(chosen) and not os.path.isdir(chosen)):
            raise ValueError(f"MELT_CACHE_DIR must name a folder, which is made where needed, got {chosen!r}")
        return Path(chosen)
    try:
        if sys.platform == "win32":
            base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
        elif sys.platform == "darwin":
            base = Path.home() / "Library" / "Caches"
        else:
            base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError as error:
        raise ValueError(f"MELT_CACHE_DIR must name a folder where a user has no home: {error}") from error
    return base / "melt-onnx"


def _default_limit() -> int:
    chosen = os.environ.get("MELT_CACHE_GB")
    if chosen is None:
        return DEFAULT_LIMIT
    try:
        gigabytes = float(chosen)
    except ValueError:
        gigabytes = math.nan
    if not 0 <= gigabytes <= _MOST_GB:
        raise ValueError(f"MELT_CACHE_GB must be a number of gigabytes from 0 to {_MOST_GB:.0f}, got {shown(chosen)}")
    return int(gigabytes * 1e9)
