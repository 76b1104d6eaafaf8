"""Batches over a cluster: every row once, whoever is lost meanwhile; and what is refused before the work starts."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import STORE
from serving import wait_until

from melt_ray import BatchSettings, batch, job
from melt_ray.bundles import BundleIdentity
from melt_ray.parts import begin_run, read_part
from melt_ray.rows import count_rows
from melt_ray.worker import Worker
from melt_runtime import BundleError, BusyError, MeltError, MeltModel

BAD = (None, "", "  ")


def prompt(number: int) -> str:
    return f"Ana{number} reports to Ben. Ben works for Cleo. Who is {1 + number % 2} levels above Ana{number}?"


@pytest.fixture(scope="module", autouse=True)
def nodes(cluster) -> list:
    return [cluster.add_node(num_cpus=1, object_store_memory=STORE) for _ in range(2)]


def lines(path: Path, count: int) -> Path:
    path.write_text("".join(json.dumps({"prompt": prompt(number)}) + "\n" for number in range(count)))
    return path


def rows_of(out: Path) -> list[dict]:
    return [row for part in sorted((out / "parts").iterdir()) for row in read_part(part)]


def assert_each_row_once(out: Path, counts: dict[str, int]) -> list[dict]:
    rows = rows_of(out)
    expected = {(name, number) for name, count in counts.items() for number in range(count)}
    seen = Counter((Path(row["file"]).name, row["row"]) for row in rows)
    assert seen == Counter(expected)
    return rows


def settings(**changes) -> BatchSettings:
    return BatchSettings(**{"device": "cpu", "capacity": 256, "part_rows": 8, "slots": 4, "actors": 2, **changes})


def test_every_row_has_an_answer_or_an_error(tmp_path, bundle):
    source = tmp_path / "source"
    source.mkdir()
    values = [*BAD, *map(prompt, range(20)), "x " * 300]
    pq.write_table(pa.table({"prompt": values}), source / "a.parquet", row_group_size=5)
    chats = [{"prompt": [{"role": "user", "content": prompt(7)}]}, {"prompt": [5, 6, 7]}, {"prompt": 5}, {"other": 1}]
    (source / "b.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats) + "{nonsense\n\n")
    told = []
    chosen = settings(generation={"temperature": 0.0, "loops": 2, "max_new_tokens": 8})
    summary = batch(source, bundle, tmp_path / "out", chosen, lambda *values: told.append(values))
    rows = assert_each_row_once(tmp_path / "out", {"a.parquet": 24, "b.jsonl": 5})
    errors = [(Path(row["file"]).name, row["row"], row["error"]) for row in rows if row["error"] is not None]
    assert [error[:2] for error in errors] == [
        *(("a.parquet", number) for number in (0, 1, 2, 23)),
        *(("b.jsonl", number) for number in (2, 3, 4)),
    ]
    assert all(row["text"] is None for row in rows if row["error"] is not None)
    assert "the prompt is null" in errors[0][2]
    assert "the capacity is 256" in errors[3][2]
    assert (summary.rows, summary.now, summary.errors) == (29, 29, 7)
    assert told[-1][:2] == (29, 29)
    model = MeltModel.load(bundle, device="cpu", capacity=256)
    for row in rows:
        if row["error"] is None and row["row"] < 6:
            value = values[row["row"]] if row["file"].endswith("a.parquet") else chats[row["row"]]["prompt"]
            expected = model.generate(value, temperature=0.0, loops=2, max_new_tokens=8)
            assert (row["text"], row["tokens"]) == (expected.text, list(expected.token_ids))
            assert row["loops_per_token"] == list(expected.loops_per_token)
            assert row["finish_reason"] == expected.finish_reason
            assert row["passes"] >= 2
            assert row["seconds"] > 0
    again = batch(source, bundle, tmp_path / "out", chosen)
    assert (again.before, again.now, again.tokens) == (29, 0, 0)


def test_an_actor_lost_after_it_wrote_writes_nothing_twice(tmp_path, bundle):
    class Lost(Worker):
        """Its process ends after its second part, once."""

        def _write(self, path, answers):
            super()._write(path, answers)
            mark = Path(self._out) / ".lost"
            if len(list(path.parent.glob("*.jsonl"))) == 2 and not mark.exists():
                mark.touch()
                os._exit(1)

    source, out = lines(tmp_path / "a.jsonl", 60), tmp_path / "out"
    chosen = settings(format="jsonl", actors=1)
    begin_run(out, {})
    ranges = list(count_rows(source, "prompt", 8).ranges(0))
    summary = job._answer(ranges, 60, BundleIdentity.of(bundle), out, chosen, None, Lost)
    assert (out / ".lost").exists()
    rows = assert_each_row_once(out, {"a.jsonl": 60})
    assert summary.now == 60
    assert summary.tokens == sum(len(row["tokens"]) for row in rows)


def test_a_lost_node_loses_no_row(tmp_path, bundle, cluster, nodes):
    source, out = lines(tmp_path / "a.jsonl", 400), tmp_path / "out"
    lost = nodes.pop()
    cluster.add_node(num_cpus=1, object_store_memory=STORE)

    def lose() -> None:
        wait_until(lambda: len(list(out.glob("parts/*.parquet"))) >= 3)
        cluster.remove_node(lost, allow_graceful=False)

    thread = threading.Thread(target=lose)
    thread.start()
    summary = batch(source, bundle, out, settings(generation={"max_new_tokens": 24}))
    thread.join()
    rows = assert_each_row_once(out, {"a.jsonl": 400})
    assert (summary.now, summary.errors) == (400, 0)
    assert all(row["error"] is None for row in rows)


def test_a_killed_driver_goes_on_where_it_was(tmp_path, bundle, cluster):
    source, out = lines(tmp_path / "a.jsonl", 400), tmp_path / "out"
    command = [sys.executable, "-W", "ignore", "-m", "melt_ray.cli", "batch", source, "--bundle", bundle, "--out", out]
    command += ["--address", cluster.address, "--part-rows", "8", "--capacity", "256", "--device", "cpu"]
    command += ["--slots", "4", "--max-new-tokens", "24", "--actors", "2"]
    parts = out / "parts"
    driver = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    wait_until(lambda: parts.is_dir() and len(list(parts.glob("*.parquet"))) >= 5)
    with pytest.raises(BusyError, match="another process is at work in"):
        batch(source, bundle, out, settings(generation={"max_new_tokens": 24}))
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    driver.stderr.close()
    before = {path.name: path.stat().st_mtime_ns for path in parts.glob("*.parquet")}
    assert 5 <= len(before) < 50
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "400 of 400 rows are written" in done.stderr
    assert_each_row_once(out, {"a.jsonl": 400})
    assert {name: (parts / name).stat().st_mtime_ns for name in before} == before


def test_what_cannot_be_done_is_refused_before_it_is_begun(tmp_path, bundle):
    source, out = lines(tmp_path / "a.jsonl", 3), tmp_path / "out"
    (tmp_path / "b.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ValueError, match=r"files that cannot be used\n  .*b.parquet cannot be read"):
        batch([source, tmp_path / "b.parquet"], bundle, out, settings())
    with pytest.raises(ValueError, match="has no column 'question'"):
        batch(source, bundle, out, settings(column="question"))
    with pytest.raises(BundleError):
        batch(source, tmp_path, out, settings())
    with pytest.raises(ValueError, match="capacity must be at least 1"):
        batch(source, bundle, out, settings(capacity=0))
    assert not out.exists()
    batch(source, bundle, out, settings())
    with pytest.raises(ValueError, match="generation is {} there, and "):
        batch(source, bundle, out, settings(generation={"loops": 1}))
    lines(source, 4)
    with pytest.raises(ValueError, match="files is .* there, and .* now"):
        batch(source, bundle, out, settings())
    assert_each_row_once(out, {"a.jsonl": 3})


def test_why_a_batch_stopped_is_said_in_a_sentence(tmp_path, bundle):
    class Broken(Worker):
        """Gives up."""

        def _write(self, path, answers):
            raise OSError("no space left")

    class Unmade(Worker):
        """Cannot begin."""

        def _load(self, expected):
            raise BundleError("bundle x must be on every node")

    ranges = list(count_rows(lines(tmp_path / "a.jsonl", 3), "prompt", 8).ranges(0))
    (tmp_path / "parts").mkdir()
    for worker, message in ((Broken, "no space left"), (Unmade, "bundle x must be on every node")):
        with pytest.raises(MeltError, match=f"the batch stopped after 0 of 3 rows, .* on node .*: {message}$"):
            job._answer(ranges, 3, BundleIdentity.of(bundle), tmp_path, settings(), None, worker)


@pytest.mark.parametrize(("asked", "told"), [({}, "0"), ({"RAY_USAGE_STATS_ENABLED": "1"}, "1")])
def test_a_cluster_is_started_without_usage_statistics(asked, told, monkeypatch):
    monkeypatch.setattr(os, "environ", asked)
    seen = []
    monkeypatch.setattr(job.ray, "init", lambda **_: seen.append(os.environ["RAY_USAGE_STATS_ENABLED"]))
    job.connect()
    assert seen == [told]
