"""Rows counted, read and written: without a cluster."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from melt_ray.parts import begin_run, part_path, read_part, write_part
from melt_ray.rows import RowRange, count_rows, files_of, read_rows
from melt_ray.settings import BatchSettings
from melt_runtime import GenerationConfig
from melt_runtime.cli.batch_prompts import read_prompts


def ranges(path, size, column="prompt"):
    return list(count_rows(path, column, size).ranges(7))


def test_ranges_of_lines_hold_each_line_once(tmp_path):
    path = tmp_path / "a.jsonl"
    prompts = [f"Größe {number}" * (number % 3) for number in range(23)]
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts)[:-1], encoding="utf-8")
    for size in (1, 4, 23, 100):
        found = ranges(path, size)
        assert [value for one in found for value in read_rows(one, "prompt")] == prompts
        assert [one.start for one in found] == list(range(0, 23, size))
        assert {one.file for one in found} == {7}


def test_ranges_of_parquet_hold_each_row_once(tmp_path):
    path = tmp_path / "a.parquet"
    prompts = [f"text {number}" if number % 5 else None for number in range(50)]
    pq.write_table(pa.table({"other": range(50), "prompt": prompts}), path, row_group_size=7)
    for size in (1, 6, 7, 20, 50, 51):
        assert [value for one in ranges(path, size) for value in read_rows(one, "prompt")] == prompts


def test_bad_lines_are_rows_with_an_error(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"prompt": "x"}\n\n{nonsense\n[1]\n{"other": 1}\n\xff\n{"prompt": null}\n')
    (rows,) = ranges(path, 100)
    values = list(read_rows(rows, "prompt"))
    assert len(values) == rows.stop == 6
    assert values[0] == "x"
    assert all(isinstance(value, ValueError) for value in values[1:5])
    assert "no field 'prompt'" in str(values[3])
    assert values[5] is None


def test_lines_are_read_as_melt_batch_reads_them(tmp_path):
    """A byte order mark, blank lines, also at the ends, Windows' line ends."""
    path = tmp_path / "a.jsonl"
    lines = [b"\xef\xbb\xbf", b" ", *(b'{"id": %d, "prompt": "%d"}' % (number, number) for number in range(3)), b"\t"]
    path.write_bytes(lines[0] + b"\r\n\r\n".join(lines[1:]) + b"\n\n")
    with path.open("rb") as file:
        expected = [line.prompt for line in read_prompts(file, "a", GenerationConfig())]
    for size in (1, 2, 9):
        assert [value for one in ranges(path, size) for value in read_rows(one, "prompt")] == expected
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "x"}')
    assert list(read_rows(*ranges(path, 1), "prompt")) == ["x"]
    path.write_bytes(b"\n \n")
    assert ranges(path, 4) == []


def test_an_empty_file_has_no_rows(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"")
    assert ranges(path, 4) == []


def test_files_that_cannot_be_used_are_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"question": "x"}\n')
    (tmp_path / "b.parquet").write_bytes(b"PAR1 no")
    pq.write_table(pa.table({"question": ["x"]}), tmp_path / "c.parquet")
    with pytest.raises(ValueError, match=r"a.jsonl has no column 'prompt' in its first 1 rows"):
        count_rows(tmp_path / "a.jsonl", "prompt", 4)
    with pytest.raises(ValueError, match=r"b.parquet cannot be read"):
        count_rows(tmp_path / "b.parquet", "prompt", 4)
    with pytest.raises(ValueError, match=r"c.parquet has no column 'prompt', it has question"):
        count_rows(tmp_path / "c.parquet", "prompt", 4)
    (tmp_path / "d.txt").write_text("x")
    with pytest.raises(ValueError, match=r"d.txt must end in .jsonl or .parquet"):
        files_of([tmp_path / "d.txt"])
    with pytest.raises(ValueError, match="is named twice"):
        files_of([tmp_path, tmp_path / "a.jsonl"])
    with pytest.raises(ValueError, match="does not exist"):
        files_of([tmp_path / "nothing.jsonl"])
    assert [path.name for path in files_of([tmp_path])] == ["a.jsonl", "b.parquet", "c.parquet"]


def test_a_file_that_shrank_is_an_error(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "x"}\n' * 5)
    (rows,) = ranges(path, 100)
    path.write_text('{"prompt": "x"}\n' * 4)
    with pytest.raises(ValueError, match="has changed"):
        list(read_rows(rows, "prompt"))


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_a_part_is_read_as_it_was_written(kind, tmp_path):
    path = part_path(tmp_path, RowRange(0, "x", 5, 7, 0), kind)
    path.parent.mkdir()
    whole = {"file": "x", "row": 5, "text": "Größe", "finish_reason": "stop", "tokens": [1, 2], "passes": 3}
    whole |= {"loops_per_token": [4, 1], "prompt_tokens": 9, "seconds": 0.5, "error": None}
    write_part(path, [whole, {"file": "x", "row": 6, "error": "bad"}])
    first, second = read_part(path)
    assert first == whole
    assert second == {**dict.fromkeys(whole), "file": "x", "row": 6, "error": "bad"}
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_another_run_is_refused_in_a_folder(tmp_path):
    out = tmp_path / "out"
    begin_run(out, {"loops": 1, "files": []})
    begin_run(out, {"loops": 1, "files": []})
    with pytest.raises(ValueError, match=r"loops is 1 there, and 2 now; name another folder"):
        begin_run(out, {"loops": 2, "files": []})
    (out / "run.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        begin_run(out, {"loops": 1, "files": []})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("x")
    with pytest.raises(ValueError, match="must be a new folder"):
        begin_run(tmp_path / "other", {})


def test_settings_are_refused_by_name():
    for values, message in (
        ({"format": "csv"}, "format must be one of parquet, jsonl"),
        ({"part_rows": 0}, "part_rows must be at least 1"),
        ({"cpus": 0}, "cpus must be above 0"),
        ({"threads": 0}, "threads must be a whole number of at least 1"),
        ({"generation": {"loops": 0}}, "loops must be"),
    ):
        with pytest.raises(ValueError, match=message):
            BatchSettings(**values)
