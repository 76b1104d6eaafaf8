"""Folders and files that appear whole or not at all."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from melt_files.partial import partial_folder


def require_absent(out: Path, error: type[Exception]) -> None:
    """Refuses an output that exists, with the caller's kind of error."""
    if os.path.lexists(out):  # a link to nothing too, which no folder could replace
        raise error(f"{out} exists: choose another --out, or remove it first")


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A temporary sibling that becomes ``out``, which must not exist, at the end; or disappears.

    What killed processes left beside ``out`` is removed first.

    Raises:
        FileExistsError: at the end, another process made ``out`` meanwhile; that stays, the sibling is gone.
        OSError: the folder of ``out`` cannot be written.
    """
    with partial_folder(out.parent, out.name) as staging:
        yield staging
        staging.chmod(0o755)
        try:
            staging.rename(out)
        except OSError as error:
            if not os.path.lexists(out):
                raise
            raise FileExistsError(
                f"{out} was made by another process meanwhile: it is left as it is, and what was to take its place is "
                "removed; choose another place, or remove it and begin anew"
            ) from error


def replace_file(path: Path, write: Callable[[Path], object], make_parent: Callable[[], None] | None = None) -> None:
    """Writes a file in one step: a reader, another writer or a full disk finds the old file or the new one.

    Args:
        path: the file.
        write: called with where to write it.
        make_parent: as for ``partial_folder``.
    """
    with partial_folder(path.parent, path.name, make_parent) as place:
        new = place / path.name
        write(new)
        os.replace(new, path)


def replace_text(path: Path, text: str, make_parent: Callable[[], None] | None = None) -> None:
    """As ``replace_file``, with a text."""
    replace_file(path, lambda new: new.write_text(text, encoding="utf-8"), make_parent)
