"""Outputs appear whole or not at all; what a dead process left goes with the next one, and nothing else does."""

import errno
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import HANG
from many_files import make_many

from melt_files import matching, partial_folder, partials, remove_dead, replace_text, require_absent, staged

MAKER = """
import signal, sys, time
from pathlib import Path
from melt_files import staged
for number in (signal.SIGHUP, signal.SIGTERM):  # who started the tests may ignore them, as nohup does
    signal.signal(number, signal.SIG_DFL)
while True:
    with staged(Path(sys.argv[1])) as folder:
        (folder / "half").write_text("x" * 1000)
        print("making", flush=True)
        time.sleep(float(sys.argv[2]))
    (Path(sys.argv[1]) / "half").unlink()
    Path(sys.argv[1]).rmdir()
"""


def start_making(out, seconds=600.0) -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, "-c", MAKER, str(out), str(seconds)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "making\n"
    return process


def kill(process: subprocess.Popen, number=signal.SIGKILL) -> None:
    process.send_signal(number)
    process.communicate()


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGHUP, signal.SIGTERM])
def test_the_next_run_removes_what_a_dead_one_left(tmp_path, number):
    out = tmp_path / "out"
    kill(start_making(out), number)
    assert [partial.dead for partial in partials(tmp_path)] == [True]
    assert len(names(tmp_path)) == 2
    with staged(out) as folder:
        assert len(names(tmp_path)) == 2  # only those of this run
        (folder / "whole").touch()
    assert names(tmp_path) == ["out"]
    assert names(out) == ["whole"]


def test_another_output_in_the_same_folder_cleans_up_too(tmp_path):
    """A training run's next checkpoint has another name than the one that was lost."""
    for _ in range(3):
        kill(start_making(tmp_path / "step-000050"))
    with staged(tmp_path / "step-000100"):
        pass
    assert names(tmp_path) == ["step-000100"]


def test_what_lives_is_left_alone(tmp_path):
    process = start_making(tmp_path / "out")
    before = names(tmp_path)
    with partial_folder(tmp_path, "mine"):
        remove_dead(tmp_path)
        assert len(names(tmp_path)) == 4
        assert [partial.dead for partial in partials(tmp_path)] == [False, False]
    assert names(tmp_path) == before
    kill(process)
    remove_dead(tmp_path)
    assert names(tmp_path) == []


def foreign_machine(mark):
    values = json.loads(mark.read_text())
    mark.write_text(json.dumps({**values, "host": "elsewhere", "boot": "another"}))


def without_locks(mark):
    mark.write_text(json.dumps({**json.loads(mark.read_text()), "locked": False}))


def not_ours(mark):
    mark.write_text('{"made_by": "another program"}')


def no_text(mark):
    mark.write_bytes(b"\xff\xfe")


def a_link(mark):
    mark.rename(mark.parent / "elsewhere")
    mark.symlink_to(mark.parent / "elsewhere")


@pytest.mark.parametrize("change", [foreign_machine, without_locks, not_ours, no_text, a_link])
def test_what_is_not_surely_ours_and_dead_stays(tmp_path, change):
    kill(start_making(tmp_path / "out"))
    (mark,) = tmp_path.glob(".*.owner")
    change(mark)
    (tmp_path / ".other.partial").mkdir()
    (tmp_path / ".other.owner").mkdir()
    before = names(tmp_path)
    with partial_folder(tmp_path, "mine"):
        pass
    assert names(tmp_path) == before


def test_the_same_machine_under_another_name(tmp_path):
    """A container that was started anew."""
    kill(start_making(tmp_path / "out"))
    (mark,) = tmp_path.glob(".*.owner")
    values = json.loads(mark.read_text())
    if not values["boot"]:
        pytest.skip("this system does not number its boots")
    mark.write_text(json.dumps({**values, "host": "elsewhere"}))
    remove_dead(tmp_path)
    assert names(tmp_path) == []


def test_a_process_that_died_before_it_could_say_who_it_is(tmp_path):
    (tmp_path / ".out.0123abcd.owner").touch()
    remove_dead(tmp_path)
    assert names(tmp_path) == []


def test_a_failure_leaves_nothing(tmp_path):
    with pytest.raises(FileNotFoundError), staged(tmp_path / "new" / "out") as folder:
        (folder / "no folder" / "half").touch()
    assert names(tmp_path / "new") == []


def test_killed_at_random_moments(tmp_path):
    chance = random.Random(0)
    for _ in range(12):
        process = start_making(tmp_path / "out", 0.002)
        time.sleep(chance.uniform(0, 0.05))
        process.stdout.close()
        process.kill()
        process.wait()
        if (tmp_path / "out").exists():
            shutil.rmtree(tmp_path / "out")
    with staged(tmp_path / "last"):
        pass
    assert names(tmp_path) == ["last"]


def test_several_processes_make_and_clean_up_at_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=make_many, args=(tmp_path, number, queue)) for number in range(3)]
    for process in processes:
        process.start()
    assert [queue.get(timeout=HANG) for _ in processes] == ["well"] * 3
    for process in processes:
        process.join()
    assert len(names(tmp_path)) == 3 * 40 + 1
    assert all((tmp_path / name / "file").read_text() == "whole" for name in names(tmp_path) if name != "inner")
    assert names(tmp_path / "inner") in ([], ["text"])


def test_a_text_is_replaced_whole(tmp_path):
    path = tmp_path / "text"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        replace_text(path, "new \ud800")
    assert path.read_text() == "old"
    replace_text(path, "new")
    assert path.read_text() == "new"
    assert names(tmp_path) == ["text"]


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="file"), staged(tmp_path / "file" / "out"):
        pytest.fail("something was made")
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_a_folder_in_which_nothing_can_be_made(tmp_path):
    """It stands there, and the system says that there is no such file."""
    with pytest.raises(FileNotFoundError) as raised, staged(Path("/proc/x")):
        pytest.fail("something was made")
    assert str(raised.value) == f"the folder /proc cannot be written: {os.strerror(errno.ENOENT)}"


def test_a_refusal_names_the_folder(tmp_path, monkeypatch):
    def refuse(path, *_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    monkeypatch.setattr("melt_files.partial.os.open", refuse)
    with pytest.raises(PermissionError) as raised, staged(tmp_path / "out"):
        pytest.fail("something was made")
    assert str(raised.value) == f"the folder {tmp_path} cannot be written: {os.strerror(errno.EACCES)}"


def test_a_folder_that_another_removes_each_time(tmp_path):
    parent = tmp_path / "parent"
    with (
        pytest.raises(OSError, match=f"the folder {parent} is removed again and again while something is made in it"),
        partial_folder(parent, "x", lambda: None),
    ):
        pytest.fail("something was made")


def make(path, kind) -> None:
    if kind == "folder":
        path.mkdir()
        (path / "theirs").touch()
    elif kind == "file":
        path.touch()
    else:
        path.symlink_to("nowhere")


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_what_another_made_meanwhile_stays(tmp_path, kind):
    out = tmp_path / "out"
    message = f"{out} was made by another process meanwhile: it is left as it is"
    with pytest.raises(FileExistsError, match=message), staged(out):
        make(out, kind)
    assert names(tmp_path) == ["out"]
    assert out.is_symlink() or out.is_file() or names(out) == ["theirs"]


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_an_output_that_exists_is_refused(tmp_path, kind):
    out = tmp_path / "out"
    require_absent(out, ValueError)
    make(out, kind)
    with pytest.raises(ValueError, match=f"{out} exists: choose another --out"):
        require_absent(out, ValueError)


def test_a_folder_that_goes_while_it_is_read_has_nothing_in_it(tmp_path, monkeypatch):
    """Python 3.11's glob looks whether a folder is there, and then reads it: another process may come between."""
    place = tmp_path / "cache"
    place.mkdir()
    read = os.scandir

    def scandir(folder):
        if str(folder) == str(place):
            place.rmdir()
        return read(folder)

    monkeypatch.setattr("os.scandir", scandir)
    assert matching(place, "*") == []
    place.mkdir()
    with partial_folder(place, "result") as made:
        assert made.is_dir()
