"""The command ``melt cache``: what makes a second load fast, listed and deleted."""

import argparse
import time

from melt_runtime.loading.load_cache import LoadCache, folder_bytes
from melt_runtime.memory.estimate import format_bytes

_EPILOG = """\
examples:
  melt cache
  melt cache --clear

The folder is MELT_CACHE_DIR, else the system's for caches; MELT_CACHE_GB bounds it.
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``melt cache``."""
    parser.epilog = _EPILOG
    parser.add_argument("--clear", action="store_true", help="delete the copies; they are made again when needed")


def run(args: argparse.Namespace) -> None:
    """Lists the copies, or deletes them.

    Raises:
        ValueError: ``MELT_CACHE_DIR`` or ``MELT_CACHE_GB`` is outside its rule.
    """
    cache = LoadCache()
    if args.clear:
        cleared = cache.clear()
        print(f"{cache.folder}: freed {format_bytes(cleared.freed)}")
        for path in cleared.left:
            print(f"  left alone, not ours or in use: {path}")
        return
    entries = cache.entries()
    partials = [(folder_bytes(partial.folder), partial.dead) for partial in cache.partials()]
    total = sum(entry.nbytes for entry in entries) + sum(nbytes for nbytes, _ in partials)
    print(f"{cache.folder}: {format_bytes(total)} of at most {format_bytes(cache.limit)}")
    for entry in entries:
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.last_used))
        print(f"  {format_bytes(entry.nbytes):>10}  used {used}  {entry.source}")
    for nbytes, dead in partials:
        state = "left by a process that died; the next copy or --clear removes it" if dead else "being made now"
        print(f"  {format_bytes(nbytes):>10}  {state}")
