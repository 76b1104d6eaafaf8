"""Folders in the making: beside their place under a hidden name, and removed when whoever made them is gone.

Two names in the folder where the result shall appear, with the same random letters:

    .{name}.{random}.owner     who makes it; locked as long as that process lives, which the system ends with it
    .{name}.{random}.partial   the folder

A lock cannot be mistaken for another process's as a process number can, which is given again. On a disk that several
machines share a lock may not be seen by all of them: each removes only what was made on it. Where the disk has no locks
at all nothing is removed.
"""

import errno
import json
import os
import platform
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from melt_files.listing import matching
from melt_files.locks import lock

_OWNER, _PARTIAL = ".owner", ".partial"
_MAKER = "melt-onnx"
_TRIES = 100
_BOOT = Path("/proc/sys/kernel/random/boot_id")  # the same in every container of a machine, whose names differ


@dataclass(frozen=True)
class Partial:
    """A folder in the making, or what remains of one.

    Attributes:
        folder: where it lies.
        dead: whether the process that made it has ended, on this machine.
    """

    folder: Path
    dead: bool


@contextmanager
def partial_folder(parent: Path, name: str, make_parent: Callable[[], None] | None = None) -> Iterator[Path]:
    """A new folder in ``parent``, which is made where needed; what is still there at the end is removed.

    Before that, everything that dead processes left in ``parent`` is removed.

    Args:
        parent: where the result shall appear.
        name: of the result.
        make_parent: makes ``parent``, where it is more than a folder; called again where another process removes it.

    Raises:
        OSError: ``parent`` cannot be written.
    """
    remove_dead(parent)
    mark, descriptor = _make_mark(parent, name, make_parent or partial(_make_parent, parent))
    folder = mark.with_suffix(_PARTIAL)
    try:
        folder.mkdir(0o700)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)  # before the name goes: Windows removes no open file
        _remove_mark(mark)


def remove_dead(parent: Path) -> None:
    """Removes the folders in the making in ``parent`` whose processes have ended; leaves all else alone."""
    for mark in matching(parent, f".*{_OWNER}"):
        with _claimed(mark) as dead:
            if dead:
                shutil.rmtree(mark.with_suffix(_PARTIAL), ignore_errors=True)
        if dead:
            _remove_mark(mark)


def partials(parent: Path) -> list[Partial]:
    """Every folder in the making in ``parent``."""
    found = []
    for mark in matching(parent, f".*{_OWNER}"):
        folder = mark.with_suffix(_PARTIAL)
        with _claimed(mark) as dead:
            if folder.is_dir():
                found.append(Partial(folder, dead))
    return found


def _make_mark(parent: Path, name: str, make_parent: Callable[[], None]) -> tuple[Path, int]:
    refusal, removed = None, False
    for _ in range(_TRIES):
        make_parent()
        mark = parent / f".{name}.{secrets.token_hex(4)}{_OWNER}"
        try:
            descriptor = os.open(mark, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:  # the name is taken
            continue
        except FileNotFoundError as error:  # another process removed the parent, or nothing can be made in it: /proc
            refusal, removed = error, removed or not parent.is_dir()
            continue
        except OSError as error:
            raise _unwritable(parent, error) from error
        try:
            locked = lock(descriptor, wait=True) is True
            if mark.exists():  # else one who cleans up came between
                os.write(descriptor, _describe_owner(locked))
                return mark, descriptor
        except BaseException:
            os.close(descriptor)
            _remove_mark(mark)
            raise
        os.close(descriptor)
    if refusal is not None and not removed:
        raise _unwritable(parent, refusal) from refusal
    raise OSError(f"the folder {parent} is removed again and again while something is made in it")


def _make_parent(parent: Path) -> None:
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(parent)) from error


def _unwritable(parent: Path, error: OSError) -> OSError:
    """The system's refusal, of the folder: the name that was tried in it is ours, and says nothing to anybody."""
    return type(error)(f"the folder {parent} cannot be written: {error.strerror}")


def _remove_mark(mark: Path) -> None:
    """Removes a mark whose folder is gone; one that is not can still be found by it."""
    if not mark.with_suffix(_PARTIAL).exists():
        with suppress(OSError):
            mark.unlink(missing_ok=True)


@contextmanager
def _claimed(mark: Path) -> Iterator[bool]:
    """Whether a mark's process has ended; nobody else finds that out at the same time."""
    try:
        descriptor = os.open(mark, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
    except OSError:
        yield False
        return
    try:
        regular = stat.S_ISREG(os.fstat(descriptor).st_mode)
        yield regular and lock(descriptor, wait=False) is True and _is_ours(os.read(descriptor, 4096), mark)
    finally:
        os.close(descriptor)


def _describe_owner(locked: bool) -> bytes:
    values = {"made_by": _MAKER, "host": platform.node(), "boot": _boot(), "pid": os.getpid(), "locked": locked}
    return json.dumps(values).encode()


def _is_ours(content: bytes, mark: Path) -> bool:
    """Whether a mark is of a process of this machine whose lock could be seen."""
    if not content:  # it ended between making the mark and saying so, before the folder was made
        return not mark.with_suffix(_PARTIAL).exists()
    try:
        values = json.loads(content)
    except ValueError:
        return False
    if not isinstance(values, dict) or values.get("made_by") != _MAKER or values.get("locked") is not True:
        return False
    return values.get("host") == platform.node() or values.get("boot") == _boot() != ""


def _boot() -> str:
    try:
        return _BOOT.read_text(encoding="ascii").strip()
    except OSError:
        return ""
