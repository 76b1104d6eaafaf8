"""How much work a JSON text is, counted before it is read: a parser holds everybody up, and costs by its values."""

MAX_PARTS = 1 << 16
"""Maximum number of lists, objects and their members in a body. Some 9,000 messages with a text part each fit."""
MAX_VALUES = 1 << 16
"""Maximum number of JSON values in the arguments of earlier calls that a request gives as text."""
_PARTS, _VALUES = (b"[", b"{", b":"), (b"[", b"{", b":", b",")


def may_exceed(body: bytes | bytearray) -> bool:
    """Whether a body may have more than ``MAX_PARTS``; fast, since what stands in its texts is counted as well."""
    return _count(body, _PARTS) > MAX_PARTS


def count_parts(body: bytes | bytearray) -> int:
    """Number of lists, objects and members of objects of a JSON text; as large or larger where it is not UTF-8."""
    # A zero byte is of UTF-16 or UTF-32, in which texts end elsewhere.
    return _count(body if b"\0" in body else _outside_texts(body), _PARTS)


def count_values(text: str) -> int:
    """Number of values of a JSON text, where it has many: no smaller than that, and no larger than signs in it."""
    body = text.encode("utf-8", "replace")
    count = _count(body, _VALUES)
    return count if count <= MAX_VALUES else _count(_outside_texts(body), _VALUES)


def _outside_texts(body: bytes | bytearray) -> bytes:
    return b"".join(body.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')[::2])


def _count(body: bytes | bytearray, signs: tuple[bytes, ...]) -> int:
    return sum(map(body.count, signs))
