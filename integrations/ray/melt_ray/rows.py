"""Rows of prompts in JSONL and Parquet files: counted once, then read range by range on any node. Knows nothing of Ray.

A row is named by its file and its number in it, from 0. Of JSONL every line is a row, less blank ones; a byte order
mark at the beginning is passed over: as ``melt batch`` reads such files.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from melt_runtime.arguments import shown
from melt_runtime.cli.json_lines import BOM, one_line, parse_object, read_lines

SUFFIXES = (".jsonl", ".parquet")
_SEARCHED = 1000
"""Lines in which a column is looked for: one that has it not may still be a bad row."""
_AT_ONCE = 1024


@dataclass(frozen=True)
class RowRange:
    """Rows of one file that are answered together, by one task.

    Attributes:
        file: number of the file among all.
        path: of it, by the same name on every node.
        start: first row.
        stop: the row after the last one.
        offset: bytes before the first row of JSONL; 0 of Parquet, which has an index of its own.
    """

    file: int
    path: str
    start: int
    stop: int
    offset: int


@dataclass(frozen=True)
class SourceFile:
    """A file as it was when it was counted.

    Attributes:
        path: of it.
        bytes: its size.
        rows: in it.
        starts: (first row, bytes before it) of each range.
    """

    path: str
    bytes: int
    rows: int
    starts: tuple[tuple[int, int], ...]

    def ranges(self, number: int) -> Iterator[RowRange]:
        """Its ranges; ``number`` is the file's among all."""
        for place, (start, offset) in enumerate(self.starts, start=1):
            stop = self.starts[place][0] if place < len(self.starts) else self.rows
            yield RowRange(number, self.path, start, stop, offset)


def files_of(sources: Sequence[str | Path]) -> list[Path]:
    """The files of several paths: a file itself, of a folder those that end in .jsonl or .parquet, in order.

    Raises:
        ValueError: a path that is nothing, a folder without such files, or a file that is none.
    """
    found: list[Path] = []
    faults = []
    for source in map(Path, sources):
        inside = sorted(path for path in source.glob("*") if path.suffix in SUFFIXES) if source.is_dir() else [source]
        if not inside:
            faults.append(f"{source} has no file that ends in {' or '.join(SUFFIXES)}")
        faults += [f"{path} does not exist" for path in inside if not path.is_file()]
        faults += [f"{path} must end in {' or '.join(SUFFIXES)}" for path in inside if path.suffix not in SUFFIXES]
        found += [path.resolve() for path in inside]
    if len(set(found)) < len(found):
        faults.append("a file is named twice")
    if faults or not found:
        raise ValueError("source must be files of prompts: " + ("; ".join(faults) or "none is given"))
    return found


def count_rows(path: Path, column: str, size: int) -> SourceFile:
    """Counts the rows of a file and divides them into ranges.

    Args:
        path: the file.
        column: that prompts stand in.
        size: rows of a range, at most.

    Raises:
        ValueError: it cannot be read, or has no such column.
    """
    try:
        count = _count_parquet if path.suffix == ".parquet" else _count_lines
        rows, starts = count(path, column, size)
        return SourceFile(str(path), path.stat().st_size, rows, tuple(starts))
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{path} cannot be read: {one_line(error)}") from error


def read_rows(rows: RowRange, column: str) -> Iterator[object]:
    """What stands in the column, row by row; a ``ValueError`` where a line is no JSON object, or has no such field.

    Raises:
        ValueError: the file cannot be read, or has fewer rows than were counted.
    """
    read = _read_parquet if rows.path.endswith(".parquet") else _read_lines
    try:
        values = list(islice(read(rows, column), rows.stop - rows.start))
    except (OSError, pa.ArrowException) as error:
        raise ValueError(
            f"rows {rows.start} to {rows.stop} of {rows.path} cannot be read: {one_line(error)}"
        ) from error
    if len(values) != rows.stop - rows.start:
        raise ValueError(f"{rows.path} has changed: it has fewer than the {rows.stop} rows that were counted")
    yield from values


def _count_lines(path: Path, column: str, size: int) -> tuple[int, list[tuple[int, int]]]:
    starts: list[tuple[int, int]] = []
    rows, found, first = 0, False, b""
    with path.open("rb") as file:
        for start, line in _lines(file, str(path)):
            if rows % size == 0:
                starts.append((rows, start))
            if not found and rows < _SEARCHED:
                first = first or line
                found = not isinstance(_value(line, column), ValueError)
            rows += 1
    if rows and not found:
        raise ValueError(
            f"{path} has no column {column!r} in its first {min(rows, _SEARCHED)} rows, the first is {shown(first)}: "
            "name the column that holds the prompts"
        )
    return rows, starts


def _count_parquet(path: Path, column: str, size: int) -> tuple[int, list[tuple[int, int]]]:
    with pq.ParquetFile(path) as file:
        names = file.schema_arrow.names
        if column not in names:
            raise ValueError(f"{path} has no column {column!r}, it has {', '.join(names)}: name the one of the prompts")
        rows = file.metadata.num_rows
    return rows, [(start, 0) for start in range(0, rows, size)]


def _read_lines(rows: RowRange, column: str) -> Iterator[object]:
    with open(rows.path, "rb") as file:
        file.seek(rows.offset)
        for _, line in _lines(file, rows.path):
            yield _value(line, column)


def _lines(file: BinaryIO, path: str) -> Iterator[tuple[int, bytes]]:
    """Lines that are rows, from where the file stands on, each with the bytes before it.

    Raises:
        ValueError: a line is too long to be one.
    """
    offset = file.tell()
    for _, line in read_lines(file, path):
        text = line.removeprefix(BOM) if offset == 0 else line
        if text.strip():
            yield offset, text
        offset += len(line)


def _read_parquet(rows: RowRange, column: str) -> Iterator[object]:
    with pq.ParquetFile(rows.path) as file:
        groups: list[int] = []
        before = skipped = 0
        for group in range(file.num_row_groups):
            after = before + file.metadata.row_group(group).num_rows
            if after > rows.start and before < rows.stop:
                skipped = rows.start - before if not groups else skipped
                groups.append(group)
            before = after
        batches = file.iter_batches(_AT_ONCE, row_groups=groups, columns=[column])
        values = (value for batch in batches for value in batch.column(0).to_pylist())
        yield from islice(values, skipped, None)


def _value(line: bytes, column: str) -> Any:
    """What a line has in a column, or what is wrong with the line."""
    try:
        values = parse_object(line)
    except ValueError as error:
        return error
    return values[column] if column in values else ValueError(f"the row has no field {column!r}")
