"""Arrays in a safetensors file, written and read without trust in the file: sizes are checked before anything is read.

The reader opens regular files only and maps nothing, since a mapped file that another process cuts ends this one.
"""

import json
import math
import os
import re
import stat
from collections.abc import Collection, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from melt_runtime.arguments import is_whole, shown

_MAX_HEADER_BYTES = 1 << 24
_MAX_AXES = 8
_TYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "I64": np.int64,
    "I16": np.int16,
    "U16": np.uint16,
    "I8": np.int8,
    "U8": np.uint8,
}

Entry = tuple[np.dtype[Any], tuple[int, ...], int]
"""Type, shape and first byte of an array."""


def write_tensors(path: Path, tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
    """Writes a file.

    Raises:
        OSError: it cannot be written.
    """
    try:
        save_file(dict(tensors), path, dict(metadata))
    except SafetensorError as error:  # which is how it reports a full disk
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise OSError(f"{path} cannot be written: {error}") from error
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


class TensorFile:
    """A file of arrays, open for reading.

    Attributes:
        metadata: texts beside the arrays, by name.
    """

    def __init__(self, path: Path):
        """Opens a file and reads its header.

        Raises:
            OSError: it cannot be read.
            ValueError: no regular file, or none of this form.
        """
        # Without waiting: opening a named pipe that nothing writes to would never return.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        try:
            about = os.fstat(descriptor)
            if not stat.S_ISREG(about.st_mode):
                raise ValueError("it is no regular file")
            self._file = open(descriptor, "rb", closefd=False)  # noqa: SIM115 (the descriptor is closed)
            self._begin, header = self._read_header(about.st_size)
            self.metadata, self._entries = _parse(header, about.st_size - self._begin)
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor = descriptor

    def __enter__(self) -> Self:
        """The file itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes it."""
        os.close(self._descriptor)

    def require(self, expected: Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]], shorter: Collection[str]) -> None:
        """Checks which arrays there are.

        Args:
            expected: type and shape by name.
            shorter: names of those whose first axis may be shorter.

        Raises:
            ValueError: one is missing, or of another type or shape, or there are others.
        """
        if set(expected) != set(self._entries):
            raise ValueError(
                f"it must hold {len(expected)} arrays, {shown(sorted(expected))}, got {len(self._entries)}"
            )
        for name, (dtype, shape) in expected.items():
            got, size, _ = self._entries[name]
            fits = len(size) == len(shape) and size[1:] == shape[1:] if name in shorter else size == shape
            if got != dtype or not fits or (size and size[0] > shape[0]):
                raise ValueError(f"{name} must be {dtype} of {list(shape)}, got {got} of {shown(list(size))}")

    def read(self, name: str) -> np.ndarray[Any, Any]:
        """An array, of the type and shape that its header says.

        Raises:
            OSError, ValueError: the file ends before it.
            MemoryError: it does not fit into memory.
        """
        dtype, shape, start = self._entries[name]
        values = np.empty(shape, dtype)
        self._file.seek(self._begin + start)
        if self._file.readinto(values.reshape(-1).view(np.uint8).data) != values.nbytes:
            raise ValueError("it has become shorter meanwhile")
        return values

    def _read_header(self, size: int) -> tuple[int, bytes]:
        count = int.from_bytes(self._file.read(8), "little")
        if not 2 <= count <= min(_MAX_HEADER_BYTES, size - 8):
            raise ValueError("it does not begin as a safetensors file")
        return 8 + count, self._file.read(count)


def _parse(header: bytes, size: int) -> tuple[dict[str, str], dict[str, Entry]]:
    """Texts and arrays of a header; ``size``: bytes behind it.

    Raises:
        ValueError: it is none of this form.
    """
    values = json.loads(header)
    if not isinstance(values, dict):
        raise ValueError("its header is no JSON object")
    metadata = values.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError("its metadata are no texts")
    entries = {name: _entry(name, entry, size) for name, entry in values.items()}
    described = sum(dtype.itemsize * math.prod(shape) for dtype, shape, _ in entries.values())
    if described != size:
        raise ValueError(f"its header describes {described} bytes, it has {size}")
    return metadata, entries


def _entry(name: str, entry: object, size: int) -> Entry:
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str) or entry["dtype"] not in _TYPES:
        raise ValueError(f"its entry {shown(name)} has no known type")
    shape, place = _sizes(entry.get("shape")), _sizes(entry.get("data_offsets"))
    if shape is None or place is None or len(place) != 2:
        raise ValueError(f"its entry {shown(name)} has no shape and place")
    dtype = np.dtype(_TYPES[entry["dtype"]])
    if place[1] - place[0] != dtype.itemsize * math.prod(shape) or place[1] > size:
        raise ValueError(f"its entry {shown(name)} has other bytes than its shape, or more than there are")
    return dtype, shape, place[0]


def _sizes(values: object) -> tuple[int, ...] | None:
    if not isinstance(values, list) or len(values) > _MAX_AXES:
        return None
    return tuple(values) if all(is_whole(value) and 0 <= value < 1 << 62 for value in values) else None
