"""Prepacked copies: the same bits, remade when damaged, bounded, shared; and nothing lost without them."""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
from conftest import HANG

from melt_export.bundle import ExportOptions, export_source
from melt_export.source import random_source
from melt_files import replace_text
from melt_models import MeltConfig
from melt_runtime import BundleError, MeltModel, read_manifest
from melt_runtime.cli.main import main
from melt_runtime.loading import prepacked
from melt_runtime.loading.load_cache import LoadCache, _default_folder


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
        with cache.making(key * 32, f"graph {key}") as folder:
            (folder / "graph.data").write_bytes(b"x" * 300)
        os.utime(tmp_path / (key * 32) / "entry.json", (number, number))
    assert cache.find("a" * 32) == tmp_path / ("a" * 32)  # used now, so b is the oldest
    cache.limit = 1000
    with cache.making("d" * 32, "graph d") as folder:
        (folder / "graph.data").write_bytes(b"x" * 100)
    assert {entry.source for entry in cache.entries()} == {"graph a", "graph d"}


KEY = "0123456789abcdef" * 2
MAKER = """
import sys, time
from pathlib import Path
from melt_runtime.loading.load_cache import LoadCache
with LoadCache(Path(sys.argv[1])).making(sys.argv[2], "graph") as folder:
    (folder / "graph.data").write_bytes(b"x" * 5000)
    print("making", flush=True)
    time.sleep(600)
"""


def die_making(folder) -> None:
    process = start_making(folder)
    process.kill()
    process.communicate()


def start_making(folder) -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, "-c", MAKER, folder, KEY], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "making\n"
    return process


def keep(cache, key=KEY) -> None:
    with cache.making(key, f"graph {key}") as folder:
        (folder / "graph.data").write_bytes(b"x" * 300)


def test_what_a_killed_process_left_is_counted_and_goes_with_the_next_copy(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MELT_CACHE_DIR", str(tmp_path / "cache"))
    cache = LoadCache()
    living = start_making(cache.folder)
    die_making(cache.folder)
    assert sorted(partial.dead for partial in cache.partials()) == [False, True]
    assert main(["cache"]) == 0
    out = capsys.readouterr().out
    assert "10.00 kB of at most" in out
    assert "5.00 kB  left by a process that died" in out
    assert "5.00 kB  being made now" in out
    keep(cache)
    assert [partial.dead for partial in cache.partials()] == [False]
    living.kill()
    living.communicate()
    (cache.folder / "checked").mkdir()
    die_making(cache.folder / "checked")
    cache.clear()
    assert not cache.folder.exists()


def test_a_folder_that_another_process_clears_meanwhile_is_marked_as_ours_again(tmp_path, monkeypatch):
    cache, tag = LoadCache(tmp_path / "cache"), tmp_path / "cache" / "CACHEDIR.TAG"
    make, lost = LoadCache.make_folder, []

    def make_and_lose(self):
        make(self)
        if not lost:
            lost.append(shutil.rmtree(self.folder))

    monkeypatch.setattr(LoadCache, "make_folder", make_and_lose)
    keep(cache)
    assert lost
    assert tag.is_file()
    cache.remove(KEY)
    rmdir = Path.rmdir

    def rmdir_late(folder):
        if folder == cache.folder:
            (folder / f".{KEY}.12345678.owner").touch()  # an entry is begun between the tag's end and the folder's
        rmdir(folder)

    monkeypatch.setattr(Path, "rmdir", rmdir_late)
    cache.clear()
    assert tag.is_file()


def test_what_is_being_made_counts_towards_the_limit(tmp_path):
    cache = LoadCache(tmp_path / "cache", limit=5500)
    keep(cache, "a" * 32)
    living = start_making(cache.folder)
    keep(cache, "b" * 32)
    assert [entry.folder.name for entry in cache.entries()] == ["b" * 32]
    living.kill()
    living.communicate()


def test_clear_deletes_what_is_ours_and_says_what_it_left(tmp_path, monkeypatch, capsys):
    folder, treasure = tmp_path / "chosen", tmp_path / "treasure"
    for place in (folder / "photos", folder / ("f" * 32), folder / ".mine.partial", folder / "checked", treasure):
        place.mkdir(parents=True)
        (place / "precious.txt").write_text("precious")
    (folder / ("e" * 32)).mkdir()
    (folder / ("e" * 32) / "entry.json").write_text('{"source": "another program"}')
    (folder / "checked" / f"{'c' * 32}.json").write_text('{"another": "program"}')
    (folder / ("d" * 32)).symlink_to(treasure)
    (folder / "link").symlink_to(treasure)
    before = sorted(path for path in tmp_path.rglob("*"))
    cache = LoadCache(folder)
    keep(cache)
    (folder / KEY / "link").symlink_to(treasure)
    replace_text(folder / "checked" / f"{'b' * 32}.json", '{"made_by": "melt-onnx", "files": {}}')
    die_making(folder)
    monkeypatch.setenv("MELT_CACHE_DIR", str(folder))
    assert main(["cache", "--clear"]) == 0
    out = capsys.readouterr().out
    assert f"left alone, not ours or in use: {folder / 'photos'}" in out
    assert f"left alone, not ours or in use: {folder / ('f' * 32)}" in out
    assert sorted(path for path in tmp_path.rglob("*")) == before


def test_clear_does_not_follow_a_link_in_place_of_its_notes(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    note = tmp_path / "elsewhere" / f"{'b' * 32}.json"
    note.write_text('{"made_by": "melt-onnx", "files": {}}')
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "checked").symlink_to(tmp_path / "elsewhere")
    LoadCache(tmp_path / "cache").clear()
    assert note.exists()


def test_a_folder_that_stood_before_stays(tmp_path):
    cache = LoadCache(tmp_path / "made")
    keep(cache)
    assert cache.clear().left == ()
    assert not cache.folder.exists()
    (tmp_path / "chosen").mkdir()
    cache = LoadCache(tmp_path / "chosen")
    keep(cache)
    assert cache.clear().freed > 300
    assert list(cache.folder.iterdir()) == []


@pytest.fixture
def nobody():
    """Another user's view, where this one may do everything: permissions say nothing to root."""
    public = Path(tempfile.mkdtemp(prefix="melt-cache-"))
    public.chmod(0o755)
    if os.geteuid() != 0:
        pytest.skip("only root can look as another user does")
    readable = subprocess.run(["test", "-x", public.parent], user=65534, check=False).returncode == 0
    if not readable:
        pytest.skip(f"{public.parent} is closed to other users")
    yield public
    os.seteuid(0)
    shutil.rmtree(public)


def test_a_cache_that_may_only_be_read_serves(bundle, nobody, monkeypatch):
    """As in an image whose cache another user filled; no file of it can be touched."""
    cache = LoadCache(nobody / "cache", min_bytes=0)
    shutil.copytree(bundle, nobody / "bundle")
    expected = logits(load(nobody / "bundle", cache))
    die_making(cache.folder)
    monkeypatch.setattr(prepacked, "_write_copy", lambda *_: pytest.fail("made again"))
    os.seteuid(65534)
    with pytest.raises(PermissionError):
        (cache.folder / "file").touch()
    with pytest.raises(PermissionError):
        os.utime(next(cache.folder.glob("*/entry.json")))
    np.testing.assert_array_equal(logits(load(nobody / "bundle", cache)), expected)
    assert cache.unchanged(nobody / "bundle", read_manifest(nobody / "bundle"))
    cache.clear()
    assert len(cache.entries()) == 2
    assert len(cache.partials()) == 1


def test_a_damaged_copy_that_cannot_be_removed(bundle, cache, monkeypatch):
    expected = logits(load(bundle, cache))
    for entry in cache.entries():
        path = entry.folder / "graph.onnx"
        status = path.stat()
        scribble(path)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    monkeypatch.setattr(LoadCache, "remove", lambda self, key: None)
    with pytest.warns(RuntimeWarning, match=r"no prepacked copy .* cannot load graph.onnx"):
        np.testing.assert_array_equal(logits(load(bundle, cache)), expected)


def test_a_disk_that_is_full(bundle, cache, tmp_path):
    """Real: ONNX Runtime's own writes stop in the middle of the copy."""
    expected = logits(MeltModel.load(bundle, device="cpu", capacity=64))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        with pytest.warns(RuntimeWarning, match="no prepacked copy"):
            np.testing.assert_array_equal(logits(load(bundle, cache)), expected)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert cache.entries() == []
    assert cache.partials() == []
    np.testing.assert_array_equal(logits(load(bundle, cache)), expected)
    assert len(cache.entries()) == 2


MAKE_AND_CLEAR = """
import sys
from contextlib import suppress
from pathlib import Path
from melt_runtime.loading.load_cache import LoadCache
cache, number = LoadCache(Path(sys.argv[1])), int(sys.argv[2])
for turn in range(80):
    key = "abc"[(turn + number) % 3] * 32
    if cache.find(key) is None:
        with cache.making(key, "graph") as made:
            (made / "one").write_text(key)
            (made / "other").write_text(key)
    found = cache.find(key)
    if found is not None:
        with suppress(FileNotFoundError):  # deleted meanwhile
            assert (found / "one").read_text() == (found / "other").read_text() == key
    if turn % 4 == number:
        cache.clear()
    cache.entries()
"""
LOAD = """
import sys
from pathlib import Path
import numpy as np
from melt_runtime import MeltModel
from melt_runtime.loading.load_cache import LoadCache
model = MeltModel.load(sys.argv[1], device="cpu", capacity=64, cache=LoadCache(Path(sys.argv[2]), min_bytes=0))
np.save(sys.argv[3], model.new_runner().prefill([1, 2, 3, 4, 5, 6, 7, 8, 9, 10], 4))
"""


def run_at_once(code, *commands) -> None:
    """Starts light processes together (without torch, which the tests import) and waits until all ended well."""
    processes = [
        subprocess.Popen([sys.executable, "-W", "error", "-c", code, *map(str, command)]) for command in commands
    ]
    assert [process.wait(timeout=HANG) for process in processes] == [0] * len(commands)


def test_processes_make_and_clear_the_same_cache(tmp_path):
    run_at_once(MAKE_AND_CLEAR, *((tmp_path / "cache", number) for number in range(3)))
    assert LoadCache(tmp_path / "cache").clear().left == ()


def test_processes_load_at_once(bundle, cache, tmp_path):
    expected = logits(MeltModel.load(bundle, device="cpu", capacity=64))
    run_at_once(LOAD, *((bundle, cache.folder, tmp_path / f"{number}.npy") for number in range(3)))
    for number in range(3):
        np.testing.assert_array_equal(np.load(tmp_path / f"{number}.npy"), expected)
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
        patched.setattr("melt_runtime.bundle.manifest.file_entry", lambda path: pytest.fail(f"{path} was read again"))
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


def test_a_folder_whose_name_is_no_text_is_compared_too(random_bundle, cache, tmp_path):
    """On Linux a name is any bytes; Python carries those that are no text as half characters."""
    bundle = tmp_path / os.fsdecode(b"\xff")
    try:
        shutil.copytree(random_bundle(), bundle)
    except OSError:
        pytest.skip("this file system's names are text")
    manifest = read_manifest(str(bundle))
    cache.remember(str(bundle), manifest)
    assert cache.unchanged(bundle, manifest) == frozenset(manifest.files)


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
    assert "MELT_CACHE_GB must be a number of gigabytes from 0 to 9000000000, got 'many'" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["", "inf", "-inf", "nan", "-1", "1e999", "1e308", "1e300", "9.1e9", "1 GB"])
def test_a_bad_limit_is_refused_by_name(monkeypatch, value):
    monkeypatch.setenv("MELT_CACHE_GB", value)
    rule = re.escape(f"MELT_CACHE_GB must be a number of gigabytes from 0 to 9000000000, got {value!r}")
    with pytest.raises(ValueError, match=rule):
        LoadCache()


def test_the_largest_limit_is_one_that_an_argument_may_have(monkeypatch):
    monkeypatch.setenv("MELT_CACHE_GB", "9e9")
    assert LoadCache(limit=LoadCache().limit).limit == 9 * 10**18


@pytest.mark.parametrize("value", ["", "file", "dangling"])
def test_a_bad_folder_is_refused_by_name(monkeypatch, tmp_path, value):
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    value = str(tmp_path / value) if value else ""
    monkeypatch.setenv("MELT_CACHE_DIR", value)
    with pytest.raises(ValueError, match=rf"MELT_CACHE_DIR must name a folder, .* got {value!r}"):
        LoadCache()


def test_a_user_without_a_home_is_asked_for_a_folder(monkeypatch):
    for name in ("MELT_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.getuid", lambda: 123_456_789)
    with pytest.raises(ValueError, match="MELT_CACHE_DIR must name a folder where a user has no home"):
        LoadCache()


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
        note.write_text(json.dumps({"made_by": "melt-onnx", "files": {"loop.onnx": "?"}}))
    assert cache.unchanged(bundle, read_manifest(bundle)) == frozenset()
    load(bundle, cache)
