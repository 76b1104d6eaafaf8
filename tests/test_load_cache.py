"""Prepacked copies: the same bits, remade when damaged, bounded, shared; and nothing lost without them."""

import json
import multiprocessing
import os
import shutil
import time
import warnings
from collections import namedtuple

import numpy as np
import pytest

from melt_export.bundle import ExportOptions, export_source
from melt_export.source import random_source
from melt_models import MeltConfig
from melt_runtime import BundleError, MeltModel, prepacked, read_manifest
from melt_runtime.cli import main
from melt_runtime.load_cache import LoadCache, _default_folder


@pytest.fixture(scope="module")
def bundle(random_bundle):
    return random_bundle()


@pytest.fixture(scope="module")
def large_int4(tmp_path_factory):
    """Matrices of two mebibytes, as a published model has."""
    shape = {"hidden_size": 2048, "intermediate_size": 2048, "num_attention_heads": 16, "head_dim": 128}
    config = MeltConfig(**shape, num_hidden_layers=1, vocab_size=2048, max_position_embeddings=64)
    out = tmp_path_factory.mktemp("large") / "bundle"
    export_source(random_source(config), out, ExportOptions("int4", verified=False))
    return out


@pytest.fixture
def cache(tmp_path) -> LoadCache:
    return LoadCache(tmp_path / "cache", min_bytes=0)


def load(bundle, cache, **options) -> MeltModel:
    return MeltModel.load(bundle, device="cpu", capacity=64, cache=cache, **options)


def logits(model: MeltModel) -> np.ndarray:
    return model.new_runner().prefill([1, 2, 3, 4, 5, 6, 7, 8, 9, 10], 4).copy()


def test_the_copy_gives_the_same_bits(bundle, cache):
    plain = logits(MeltModel.load(bundle, device="cpu", capacity=64))
    for _ in range(2):
        np.testing.assert_array_equal(logits(load(bundle, cache)), plain)
    entries = cache.entries()
    assert sorted(os.path.basename(entry.source) for entry in entries) == ["head.onnx", "loop.onnx"]
    for entry in entries:
        assert (entry.folder / "graph.data").stat().st_size < entry.nbytes
        assert entry.nbytes == sum(path.stat().st_size for path in entry.folder.iterdir())


def test_the_copy_of_large_quantized_matrices_gives_the_same_bits(large_int4, cache):
    plain = logits(MeltModel.load(large_int4, device="cpu", capacity=64))
    np.testing.assert_array_equal(logits(load(large_int4, cache)), plain)
    load(large_int4, cache, kv_cache="int8")
    assert len(cache.entries()) == 3
    assert all((entry.folder / "graph.onnx").is_file() for entry in cache.entries())


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_copy_that_would_compute_something_else_is_not_used(random_bundle, cache, precision, monkeypatch):
    """Small quantized matrices, which ONNX Runtime does not align in the file; noted, so it is tried only once."""
    bundle = random_bundle(precision)
    plain = logits(MeltModel.load(bundle, device="cpu", capacity=64))
    np.testing.assert_array_equal(logits(load(bundle, cache)), plain)
    notes = {
        os.path.basename(entry.source): [path.name for path in entry.folder.iterdir()] for entry in cache.entries()
    }
    assert notes["loop.onnx"] == ["entry.json"]
    monkeypatch.setattr(prepacked, "_write_copy", lambda *_: pytest.fail("tried again"))
    np.testing.assert_array_equal(logits(load(bundle, cache)), plain)


def test_a_second_load_makes_nothing(bundle, cache, monkeypatch):
    load(bundle, cache)
    monkeypatch.setattr(prepacked, "_write_copy", lambda *_: pytest.fail("made again"))
    load(bundle, cache)


def test_every_kind_of_kv_cache_has_its_own_copy(bundle, cache):
    load(bundle, cache)
    load(bundle, cache, kv_cache="int8")
    names = [os.path.basename(entry.source) for entry in cache.entries()]
    assert sorted(names) == ["head.onnx", "loop.onnx", "loop_int8.onnx"]


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def scribble(path):
    path.write_bytes(b"x" * path.stat().st_size)


@pytest.mark.parametrize("damage", [truncate, scribble, os.unlink], ids=["truncated", "scribbled", "deleted"])
@pytest.mark.parametrize("name", ["graph.onnx", "graph.data", "entry.json"])
def test_damaged_copies_are_made_again(bundle, cache, damage, name):
    expected = logits(load(bundle, cache))
    for entry in cache.entries():
        damage(entry.folder / name)
    np.testing.assert_array_equal(logits(load(bundle, cache)), expected)
    assert len(cache.entries()) == 2
    assert not list(cache.folder.glob(".*"))


def test_damage_that_size_and_time_do_not_show(bundle, cache):
    """The stamp says all is well, but ONNX Runtime cannot read the graph."""
    expected = logits(load(bundle, cache))
    for entry in cache.entries():
        path = entry.folder / "graph.onnx"
        status = path.stat()
        with path.open("r+b") as stream:
            stream.write(b"\xff" * 64)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    np.testing.assert_array_equal(logits(load(bundle, cache)), expected)


def test_another_version_or_processor_has_another_copy(bundle, cache, monkeypatch):
    load(bundle, cache)
    monkeypatch.setattr(prepacked, "_processor", lambda: "another")
    load(bundle, cache)
    monkeypatch.setattr(prepacked.ort, "__version__", "0.0")
    load(bundle, cache)
    assert len(cache.entries()) == 6


def test_a_cache_that_cannot_be_written_costs_one_warning(bundle, tmp_path):
    expected = logits(MeltModel.load(bundle, device="cpu", capacity=64))
    (tmp_path / "file").write_text("in the way")
    blocked = LoadCache(tmp_path / "file" / "cache", min_bytes=0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        model = load(bundle, blocked)
    (warning,) = caught
    assert "no prepacked copy in" in str(warning.message)
    np.testing.assert_array_equal(logits(model), expected)


def test_a_full_disk_is_seen_before_it_is_written(bundle, cache, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(prepacked.shutil, "disk_usage", lambda _: usage(10, 9, 1))
    with pytest.warns(RuntimeWarning, match="the disk has 1 left: set MELT_CACHE_DIR"):
        load(bundle, cache)
    assert cache.entries() == []


def test_a_disk_that_fills_while_writing_leaves_nothing(bundle, cache, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepacked, "_write_copy", fail)
    with pytest.warns(RuntimeWarning, match="No space left on device"):
        assert logits(load(bundle, cache)).any()
    assert cache.entries() == []
    assert not list(cache.folder.glob(".*"))


def test_a_bundle_larger_than_the_cache_says_how_to_raise_the_limit(bundle, tmp_path):
    with pytest.warns(RuntimeWarning, match="set MELT_CACHE_GB higher"):
        load(bundle, LoadCache(tmp_path, limit=1000, min_bytes=0))


def test_the_entries_unused_for_longest_go_first(tmp_path):
    cache = LoadCache(tmp_path, limit=10_000)
    for number, key in enumerate("abc"):
        with cache.making(key, f"graph {key}") as folder:
            (folder / "graph.data").write_bytes(b"x" * 300)
        os.utime(tmp_path / key / "entry.json", (number, number))
    assert cache.find("a") == tmp_path / "a"  # used now, so b is the oldest
    cache.limit = 900
    with cache.making("d", "graph d") as folder:
        (folder / "graph.data").write_bytes(b"x" * 100)
    assert {entry.source for entry in cache.entries()} == {"graph a", "graph d"}


def test_what_a_crashed_process_left_is_deleted_a_day_later(tmp_path):
    cache = LoadCache(tmp_path)
    for name, age in ((".old.x.partial", 90_000), (".new.x.partial", 10)):
        (tmp_path / name).mkdir()
        stamp = time.time() - age
        os.utime(tmp_path / name, (stamp, stamp))
    with cache.making("a", "graph a"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == [".new.x.partial", "a"]


def _load_in_a_process(bundle, folder, queue) -> None:
    queue.put(logits(load(bundle, LoadCache(folder, min_bytes=0))))


def test_two_processes_load_at_once(bundle, cache):
    expected = logits(MeltModel.load(bundle, device="cpu", capacity=64))
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=_load_in_a_process, args=(bundle, cache.folder, queue)) for _ in range(3)]
    for process in processes:
        process.start()
    for _ in processes:
        np.testing.assert_array_equal(queue.get(timeout=120), expected)
    for process in processes:
        process.join()
    assert len(cache.entries()) == 2
    assert not list(cache.folder.glob(".*"))


def test_small_bundles_need_no_copy(bundle, tmp_path):
    cache = LoadCache(tmp_path / "cache")
    load(bundle, cache)
    assert not cache.folder.exists()


def test_files_are_compared_once_until_they_change(random_bundle, cache, tmp_path, monkeypatch):
    bundle = tmp_path / "bundle"
    shutil.copytree(random_bundle(), bundle)
    load(bundle, cache)
    assert cache.unchanged(bundle, read_manifest(bundle)) == frozenset(read_manifest(bundle).files)
    with monkeypatch.context() as patched:
        patched.setattr("melt_runtime.manifest.file_entry", lambda path: pytest.fail(f"{path} was read again"))
        load(bundle, cache)
    weights = bundle / "weights.data"
    content = bytearray(weights.read_bytes())
    content[1000] ^= 1
    weights.write_bytes(content)
    with pytest.raises(BundleError, match=r"weights.data was altered"):
        load(bundle, cache)
    weights.unlink()
    with pytest.raises(BundleError, match=r"weights.data is missing"):
        load(bundle, cache)


def test_the_command_lists_and_clears(bundle, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MELT_CACHE_DIR", str(tmp_path / "chosen"))
    monkeypatch.setenv("MELT_CACHE_GB", "0.5")
    assert main(["cache"]) == 0
    assert "0 B of at most 500.00 MB" in capsys.readouterr().out
    load(bundle, LoadCache(min_bytes=0))
    assert main(["cache"]) == 0
    out = capsys.readouterr().out
    assert str(bundle / "loop.onnx") in out
    assert str(bundle / "head.onnx") in out
    assert main(["cache", "--clear"]) == 0
    assert "freed" in capsys.readouterr().out
    assert not (tmp_path / "chosen").exists()
    monkeypatch.setenv("MELT_CACHE_GB", "many")
    assert main(["cache"]) == 1
    assert "MELT_CACHE_GB must be a number of gigabytes, got 'many'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("platform", "environment", "expected"),
    [
        ("linux", {"XDG_CACHE_HOME": "/x"}, "/x/melt-onnx"),
        ("linux", {"HOME": "/home/ana"}, "/home/ana/.cache/melt-onnx"),
        ("darwin", {"HOME": "/Users/ana"}, "/Users/ana/Library/Caches/melt-onnx"),
        ("win32", {"LOCALAPPDATA": "/local"}, "/local/melt-onnx"),
    ],
)
def test_the_default_folder_is_the_systems(monkeypatch, platform, environment, expected):
    for name in ("MELT_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("sys.platform", platform)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert str(_default_folder()) == expected


def test_a_damaged_note_of_checked_files_is_ignored(bundle, cache):
    load(bundle, cache)
    for note in (cache.folder / "checked").iterdir():
        note.write_text(json.dumps({"loop.onnx": "?"}))
    assert cache.unchanged(bundle, read_manifest(bundle)) == frozenset()
    load(bundle, cache)
