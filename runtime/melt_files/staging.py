"""Folders and files that appear whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def require_absent(out: Path, error: type[Exception]) -> None:
    """Refuses an output that exists, with the caller's kind of error."""
    if out.exists():
        raise error(f"{out} exists: choose another --out, or remove it first")


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A temporary sibling that becomes ``out``, which must not exist, at the end; or disappears."""
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    try:
        yield staging
        staging.chmod(0o755)
        staging.rename(out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def replace_text(path: Path, text: str) -> None:
    """Writes a file in one step: a reader, or a full disk, finds the old text or the new one."""
    new = path.with_name(f".{path.name}.partial")
    try:
        new.write_text(text, encoding="utf-8")
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)
