"""The standard streams as a command needs them: what they lack, what they cannot show, what was not text."""

import io
import os
import sys


def prepare_streams() -> None:
    """Makes output show what its encoding has not, and input bring what is not text to where it is refused by name.

    Raises:
        OSError: standard output is closed.
    """
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    if sys.stdout is None:
        raise OSError("standard output is closed")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as standard error does by itself
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")


def drop_output() -> None:
    """Forgets what could not be written to standard output: at its end Python would try once more, and complain."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def read_input() -> str:
    """All of standard input.

    Raises:
        OSError: it is closed.
        ValueError: it is empty, or no text in its encoding.
    """
    if sys.stdin is None:
        raise OSError("standard input is closed")
    if sys.stdin.isatty():
        print("the prompt, from this terminal; Ctrl-D on a line of its own ends it:", file=sys.stderr)
    text = require_utf8(sys.stdin.read(), "standard input")
    if not text.strip():
        raise ValueError("standard input is empty: it must hold the prompt")
    return text


def require_utf8(text: str, place: str) -> str:
    """The text itself; read as UTF-8 where Python, in a locale of another encoding, carried its bytes along.

    Raises:
        ValueError: it is not UTF-8.
    """
    if text.isascii():
        return text
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeDecodeError as error:
        found = f"the byte 0x{error.object[error.start]:02x} after {error.start} bytes"
    except UnicodeEncodeError as error:
        found = f"half a character after {error.start} characters"
    raise ValueError(f"{place} must be UTF-8 text, got {found}")
