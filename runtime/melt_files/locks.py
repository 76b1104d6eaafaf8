"""Locks of files that end with the process that holds them, however it ends."""

import errno
import os
import sys

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

_PLACE = 1 << 20  # Windows locks bytes, and keeps others from reading them: far behind what is written


def lock(descriptor: int, wait: bool) -> bool | None:
    """Locks an open file until it is closed.

    Args:
        descriptor: of a file that is open for writing.
        wait: for another who holds it.

    Returns:
        Whether the lock was got; None where the file's disk has no locks.
    """
    try:
        if sys.platform == "win32":
            os.lseek(descriptor, _PLACE, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)
            os.lseek(descriptor, 0, os.SEEK_SET)
        else:
            fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK) else None
    return True
