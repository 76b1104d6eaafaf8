"""What a batch writes: a folder of files, one for each range of rows, each there as a whole or not at all.

    run.json                            files, settings, bundle: another run may not go on in the folder
    parts/00000-000000000256.parquet    file 0, its range that begins with row 256

A part's name says which rows are in it, so that whoever writes it again writes over it: a row is there once, however
often its task runs.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from melt_files import replace_file, replace_text
from melt_ray.rows import RowRange

PartFormat = Literal["parquet", "jsonl"]
SCHEMA = pa.schema(
    [
        ("file", pa.string()),
        ("row", pa.int64()),
        ("text", pa.string()),
        ("finish_reason", pa.string()),
        ("tokens", pa.list_(pa.int32())),
        ("loops_per_token", pa.list_(pa.int16())),
        ("prompt_tokens", pa.int32()),
        ("passes", pa.int32()),
        ("seconds", pa.float64()),
        ("error", pa.string()),
    ]
)
"""Columns of a part; ``error`` stands alone, beside file and row, where a row could not be answered."""

_RUN = "run.json"


def part_path(out: Path, rows: RowRange, kind: PartFormat) -> Path:
    """Where the answers to a range stand."""
    return out / "parts" / f"{rows.file:05}-{rows.start:012}.{kind}"


def write_part(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes a part in one step.

    Raises:
        OSError: it cannot be written.
    """
    table = pa.Table.from_pylist([dict(row) for row in rows], SCHEMA)
    if path.suffix == ".parquet":
        replace_file(path, lambda new: pq.write_table(table, new))
    else:
        replace_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in table.to_pylist()))


def read_part(path: Path) -> list[dict[str, Any]]:
    """The rows of a part.

    Raises:
        OSError: it cannot be read.
    """
    if path.suffix == ".parquet":
        rows: list[dict[str, Any]] = pq.read_table(path, partitioning=None).to_pylist()
        return rows
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def begin_run(out: Path, run: Mapping[str, Any]) -> None:
    """Makes the folder of a run, or goes on in it.

    Raises:
        ValueError: it is another run's, or holds something else.
        OSError: it cannot be written.
    """
    path = out / _RUN
    if not path.is_file():
        if out.exists() and any(not entry.name.startswith(".") for entry in out.iterdir()):
            raise ValueError(f"out must be a new folder, or one of a run: {out} has no {_RUN}; name another")
        (out / "parts").mkdir(parents=True, exist_ok=True)
        replace_text(path, json.dumps(run, indent=2) + "\n")
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: name another folder ({error})") from error
    differ = sorted(name for name in run.keys() | before.keys() if run.get(name) != before.get(name))
    if differ:
        said = "; ".join(
            f"{name} is {_brief(before.get(name))} there, and {_brief(run.get(name))} now" for name in differ
        )
        raise ValueError(
            f"out must be the folder of this very run, {out} is another one's: {said}; name another folder"
        )


def _brief(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
