"""Kill -9 at random moments: ``python tests/kills.py``; exit status 1 where something half-made was to be seen.

exports     of a small random model: no bundle or a whole one; the next export removes what the killed one left
caches      the load cache's entries of a bundle: none or whole ones; the next load answers as without a cache
trainings   of a small model: whole checkpoints; a run that goes on ends with the weights of one that was never killed
sessions    that answer: bundle and cache stay what they were
"""

import argparse
import hashlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from conftest import random_model, save_checkpoint
from test_training_run import RECIPE, WHOLE, command, log_of, write_data
from torch.onnx._internal.exporter._registration import ONNXRegistry

from melt_export.bundle import ExportOptions, export_bundle
from melt_models.training import cli as training
from melt_runtime import MeltModel, read_manifest
from melt_runtime.bundle.manifest import check_files
from melt_runtime.loading.load_cache import LoadCache

QUESTION = "Ana reports to Ben. Who is one level above Ana?"
OPTIONS = ExportOptions(verified=False, quantized_caches=False)  # of random weights, in seconds


def main(argv: list[str] | None = None) -> int:
    """Kills each kind of work so many times; a line for each kind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, part in PARTS.items():
        parser.add_argument(f"--{name}", type=int, default=part[1], help="kills (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    args = parser.parse_args(argv)
    ONNXRegistry.from_torchlib()  # a third of the time of an export as small as ours; forks have it then
    torch.set_num_threads(1)  # the work is done in forks, where threads of this process would be missing
    warnings.simplefilter("ignore")
    failed = False
    for name, (kill_many, _) in PARTS.items():
        count = getattr(args, name)
        if not count:
            continue
        with tempfile.TemporaryDirectory(prefix="melt-kills-") as place:
            started = time.monotonic()
            try:
                line = kill_many(Path(place), count, random.Random(args.seed))
            except AssertionError:
                failed, line = True, f"BROKEN: {traceback.format_exc()}"
            print(f"{name}: {line}; {time.monotonic() - started:.0f} s", flush=True)
    return 1 if failed else 0


def kill_exports(place: Path, count: int, chance: random.Random) -> str:
    """One output folder; after every kill it is not there, or a whole bundle."""
    checkpoint = save_checkpoint(random_model(num_hidden_layers=1), place / "checkpoint")
    expected, out = place / "straight" / "bundle", place / "killed" / "bundle"
    out.parent.mkdir()
    run(lambda: export_bundle(checkpoint, expected, OPTIONS))
    files, kills, late = read_manifest(expected).files, 0, 0
    seconds = run(lambda: export_bundle(checkpoint, place / "straight" / "again", OPTIONS))
    while kills < count:
        hit = killed(lambda: export_bundle(checkpoint, out, OPTIONS), seconds, chance)
        kills, late = kills + hit, late + (not hit)
        visible, hidden = names(out.parent)
        assert visible in ([], ["bundle"]), visible
        assert len(hidden) <= 2, hidden  # of this kill alone: a folder and its mark
        if visible:
            check_files(out, read_manifest(out))
            shutil.rmtree(out)
        show("exports")
    run(lambda: export_bundle(checkpoint, out, OPTIONS))
    assert names(out.parent) == (["bundle"], [])
    assert read_manifest(out).files == files
    return f"{kills} kills within {seconds:.1f} s, {late} more came too late; the next export left nothing else"


def kill_caches(place: Path, count: int, chance: random.Random) -> str:
    """Entries that are made, killed, and made again; one that became whole is removed, so that there is work."""
    bundle, cache = a_bundle(place), LoadCache(place / "cache", min_bytes=0)
    run(lambda: answer(bundle, LoadCache(place / "none"), place / "expected"))
    for name in ("first", "second"):  # how long it takes once files lie in memory
        seconds = run(lambda name=name: answer(bundle, LoadCache(place / name, min_bytes=0), place / f"{name}-answer"))
    kills = late = 0
    while kills < count:
        hit = killed(lambda: answer(bundle, cache, place / "killed-answer"), seconds, chance)
        kills, late = kills + hit, late + (not hit)
        require_whole(cache)
        for entry in cache.entries():
            cache.remove(entry.folder.name)
        show("caches")
    run(lambda: answer(bundle, cache, place / "answer"))
    assert (place / "answer").read_text() == (place / "expected").read_text()
    assert len(cache.entries()) == 2  # loop and head
    assert cache.partials() == []
    return f"{kills} kills within {seconds:.1f} s, {late} more came too late; the next load left nothing else"


def kill_trainings(place: Path, count: int, chance: random.Random) -> str:
    """Runs that go on until they end, however often they are killed; each ends as the one that was not."""
    teacher = save_checkpoint(random_model(gate_kind="none", num_hidden_layers=1, eos_token_id=3), place / "teacher")
    data, recipe = write_data(place / "data"), place / "recipe.toml"
    recipe.write_text(RECIPE.replace("checkpoint_every = 10", "checkpoint_every = 5"))
    straight = place / "straight"
    seconds = run(lambda: training.main(command(recipe, teacher, data, straight)))
    kills = ended = 0
    while kills < count or not (place / f"run-{ended - 1}").exists():
        out = place / f"run-{ended}"

        def train(out: Path = out) -> None:
            training.main(command(recipe, teacher, data, out))

        if kills < count and killed(train, seconds, chance):
            kills += 1
            visible = [str(path.relative_to(out)) for path in out.rglob("*")]
            visible = [path for path in visible if not any(part.startswith(".") for part in path.split("/"))]
            assert all(WHOLE.fullmatch(path) or path.startswith("model") for path in visible), visible
            for folder in out.glob("checkpoints/step-*"):
                assert {"model.safetensors", "optimizer.pt"} <= set(names(folder)[0]), folder
            show("trainings")
            continue
        run(train)
        ended += 1
        assert digests(out / "model") == digests(straight / "model")
        assert log_of(out) == log_of(straight)
        assert [path.name for path in out.rglob(".*")] == [".lock"]
        if kills == count:
            break
    return f"{kills} kills within {seconds:.1f} s; {ended} runs went on to the same weights and log, bit for bit"


def kill_sessions(place: Path, count: int, chance: random.Random) -> str:
    """Processes that load through a cache and answer."""
    bundle, cache = a_bundle(place), LoadCache(place / "cache", min_bytes=0)
    run(lambda: answer(bundle, cache, place / "expected"))
    seconds = run(lambda: answer(bundle, cache, place / "again"))
    before, kills, late = (digests(bundle), digests(cache.folder)), 0, 0
    while kills < count:
        hit = killed(lambda: answer(bundle, cache, place / "killed-answer"), seconds, chance)
        kills, late = kills + hit, late + (not hit)
        assert (digests(bundle), digests(cache.folder)) == before
        show("sessions")
    run(lambda: answer(bundle, cache, place / "answer"))
    assert (place / "answer").read_text() == (place / "expected").read_text()
    return f"{kills} kills within {seconds:.1f} s, {late} more came too late; bundle and cache are what they were"


PARTS: dict[str, tuple[Callable[[Path, int, random.Random], str], int]] = {
    "exports": (kill_exports, 20),
    "caches": (kill_caches, 20),
    "trainings": (kill_trainings, 10),
    "sessions": (kill_sessions, 20),
}
"""What is killed, and how often where nobody says."""


def a_bundle(place: Path) -> Path:
    checkpoint = save_checkpoint(random_model(num_hidden_layers=1), place / "checkpoint")
    run(lambda: export_bundle(checkpoint, place / "bundle", OPTIONS))
    return place / "bundle"


def answer(bundle: Path, cache: LoadCache, out: Path) -> None:
    model = MeltModel.load(bundle, device="cpu", threads=1, cache=cache)
    out.write_text(str(model.generate(QUESTION, max_new_tokens=100, stop_ids=()).token_ids))


def require_whole(cache: LoadCache) -> None:
    """Nothing is to be seen in a cache but whole entries."""
    visible, _ = names(cache.folder) if cache.folder.exists() else ([], [])
    entries = [entry.folder.name for entry in cache.entries()]
    assert set(visible) <= {"CACHEDIR.TAG", "checked", *entries}, visible
    assert all(cache.find(key) is not None for key in entries), entries


def names(folder: Path) -> tuple[list[str], list[str]]:
    """Names in a folder: visible ones and hidden ones."""
    found = sorted(path.name for path in folder.iterdir())
    return [name for name in found if name[0] != "."], [name for name in found if name[0] == "."]


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def run(work: Callable[[], object]) -> float:
    """Does the work in a fork to its end; returns seconds."""
    started = time.monotonic()
    status = os.waitstatus_to_exitcode(os.waitpid(fork(work), 0)[1])
    assert status == 0, f"the process ended with status {status}"
    return time.monotonic() - started


def killed(work: Callable[[], object], seconds: float, chance: random.Random) -> bool:
    """Does the work in a fork and kills it within so many seconds; whether it was still at work."""
    child = fork(work)
    time.sleep(chance.uniform(0, seconds))
    os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL), f"the process ended with status {status}"
    return status != 0


def fork(work: Callable[[], object]) -> int:
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        try:
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), 1)
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    return child


def show(what: str) -> None:
    print(what[0], end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
