"""The benchmark measures what it says; its figures are not judged here."""

import json
import os
from types import SimpleNamespace

import pytest

from melt_export.cli import main as export
from melt_runtime import RunError, read_manifest
from melt_runtime.bench import measure
from melt_runtime.bench.measure import BenchOptions, run_bench
from melt_runtime.bench.report import plot_rows
from melt_runtime.cli import bench as bench_command
from melt_runtime.cli.main import main
from melt_runtime.memory.plan import plan_state

OPTIONS = BenchOptions(loops=(1, 3), positions=(20, 50), chunks=(8,), batches=(1, 2), kv_caches=("float", "int8"))


@pytest.fixture(scope="module")
def rows(random_bundle):
    return list(run_bench([random_bundle("int4")], OPTIONS))


def test_every_choice_is_measured(rows):
    seen = {(row.kind, row.kv_cache, row.loops, row.tokens, row.batch) for row in rows}
    expected = set()
    for kv_cache in ("float", "int8"):
        for loops in (1, 3):
            expected |= {("decode", kv_cache, loops, tokens, batch) for tokens in (20, 50) for batch in (1, 2)}
            expected |= {("prefill", kv_cache, loops, 8, 1), ("first token", kv_cache, loops, 128, 1)}
    assert seen == expected
    assert len(rows) == len(expected)


def test_figures_agree_with_each_other(rows, random_bundle):
    manifest = read_manifest(random_bundle("int4"))
    for row in rows:
        tokens = {"decode": row.batch, "prefill": 256, "first token": 128}[row.kind]
        assert row.tokens_per_second == pytest.approx(tokens / row.seconds)
        assert row.bandwidth == pytest.approx(manifest.streamed_bytes["loop"] / row.loop_seconds)
        assert 0 < row.loop_seconds < row.seconds
        assert 0 < row.state_bytes < row.peak_bytes


def test_state_is_what_the_plan_says_and_the_same_for_every_depth(rows, random_bundle):
    manifest = read_manifest(random_bundle("int4"))
    for row in rows:
        if row.kind == "decode":
            capacity = row.tokens + 2 * measure.DECODE_STEPS + 1
            plan = plan_state(manifest, capacity, batch=row.batch, kv_cache=row.kv_cache)
            assert row.state_bytes == plan.total_bytes
            assert row.per_loop_bytes == plan.as_per_loop(row.loops).total_bytes


def test_streamed_bytes_count_the_matrices(random_bundle):
    bundle = random_bundle("int4")
    manifest = read_manifest(bundle)
    wide, narrow, inner = 64 * 64, 64 * 32, 64 * 96  # of one layer: four of 64 x 64, two of kv heads, three of the MLP
    weights = 3 * (4 * wide + 2 * narrow + 3 * inner)
    assert 0.5 * weights < manifest.streamed_bytes["loop"] < 0.7 * weights
    assert 0.5 * 703 * 64 < manifest.streamed_bytes["head"] < 0.7 * 703 * 64


def test_the_command_prints_writes_and_draws(random_bundle, capsys, tmp_path):
    options = ["--loops", "1,2", "--positions", "20,40", "--chunks", "8", "--threads", "1"]
    files = ["--json", str(tmp_path / "bench.json"), "--plot", str(tmp_path / "bench.png")]
    assert main(["bench", str(random_bundle("int4")), *options, *files]) == 0
    out = capsys.readouterr().out
    assert "a plain loop reads" in out
    assert len([line for line in out.splitlines() if line.startswith("| bundle |")]) == 9
    found = json.loads((tmp_path / "bench.json").read_text())
    assert found["machine"]["onnxruntime"]
    assert found["options"]["threads"] == 1
    assert len(found["rows"]) == 8
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_decoded_is_nothing_to_draw(rows, tmp_path):
    prompts = [row for row in rows if row.kind == "prefill"]
    for nothing in ([], prompts):
        with pytest.raises(ValueError, match="nothing to draw: --plot shows decoding"):
            plot_rows(nothing, tmp_path / "empty.png")
    assert not list(tmp_path.iterdir())


def die(case) -> None:
    os._exit(1)


def test_a_case_whose_process_dies_is_an_error(random_bundle, monkeypatch):
    monkeypatch.setattr(measure, "_measure", die)
    with pytest.raises(RunError, match="the process that measured Case.* died"):
        list(run_bench([random_bundle("int4")], OPTIONS))


def test_a_shape_is_made_once_by_the_exporter(tmp_path, capsys, monkeypatch):
    """In a process of its own, so that torch's memory is not the bench's."""
    commands = []

    def make(command, **_):
        commands.append(command)
        (tmp_path / "melt-1.6b-2-int8").mkdir()
        return type("Done", (), {"returncode": 0})

    monkeypatch.setattr(bench_command.subprocess, "run", make)
    for _ in range(2):
        bundle = bench_command._shape_bundle("melt-1.6b:2", "int8", tmp_path)
    assert bundle == tmp_path / "melt-1.6b-2-int8"
    (command,) = commands
    assert command[1:] == [
        *("-m", "melt_export.cli", "--shape", "melt-1.6b:2", "--precision", "int8", "--out", str(bundle)),
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "name a bundle or a --shape to measure"),
        (["BUNDLE", "--loops", "0"], "loops must be numbers of at least 1, got [0]"),
        (["BUNDLE", "--positions", "5000"], "positions must stay below the model's 256, got [5000]"),
        (["BUNDLE", "--positions", "20", "--kv-cache", "int2"], "kv_caches must be of float, int8, int4"),
    ],
)
def test_bad_options_are_one_error(random_bundle, capfd, tmp_path, options, message):
    options = [str(random_bundle("int4")) if option == "BUNDLE" else option for option in options]
    assert main(["bench", "--work", str(tmp_path), *options]) == 1
    assert message in capfd.readouterr().err
    with pytest.raises(SystemExit):
        main(["bench", "--loops", "many"])


def test_a_shape_that_cannot_be_made_is_one_error(capfd, tmp_path, monkeypatch):
    """The exporter in this process, since another one only imports torch again."""
    monkeypatch.setattr(
        bench_command.subprocess, "run", lambda command, **_: SimpleNamespace(returncode=export(command[3:]))
    )
    assert main(["bench", "--work", str(tmp_path), "--shape", "melt-9b"]) == 1
    errors = capfd.readouterr().err
    assert errors.index("melt-1.6b") < errors.index("--shape melt-9b could not be made")


def test_shapes_need_the_exporter(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(bench_command.importlib.util, "find_spec", lambda name: None)
    assert main(["bench", "--shape", "melt-1.6b", "--work", str(tmp_path)]) == 1
    assert "pip install 'melt-onnx[export]'" in capsys.readouterr().err


@pytest.mark.parametrize("threads", [1, 3])
def test_bandwidth_is_bytes_over_the_median_of_five_times(monkeypatch, threads):
    """Every byte once a time, whatever the number of threads; a clock that stalls once changes nothing."""
    moments = iter((0.0, 0.5, 1.0, 1.5, 2.0, 9.0, 10.0, 10.5, 11.0, 11.5))
    monkeypatch.setattr(measure, "_READ_BYTES", 1 << 20)
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(moments))
    assert measure._read_memory(threads) == (1 << 20) / 0.5
