"""Starts a training again and again, and kills each one at another moment: MOMENTS as JSON, then its arguments.

A random moment is one of the clock, and the log of a step at the latest.

Prints a line for each: the moment, how the process ended, and what lay in the run's folder then. The processes are
forks of this one, so that torch is imported once.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

from melt_models.training import cli, saving, trainer  # noqa: F401 (imported once, here)


def die(*_arguments: object, **_options: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def prepare(moment: str) -> None:
    """Makes this process kill itself at a moment."""
    name, *numbers = moment.split(":")
    last = int(numbers[-1]) if numbers else 0
    log = saving.RunFolder.log

    def log_and_die(folder: saving.RunFolder, record: dict) -> None:
        if record["step"] == last and name == "half a line":
            with (folder.out / "log.jsonl").open("a") as file:
                file.write(json.dumps(record)[:30])
            die()
        log(folder, record)
        if record["step"] == last:
            die()

    def half_written(_state: object, path: Path) -> None:
        path.write_bytes(b"half")
        die()

    def half_removed(folder: Path) -> None:
        (folder / "config.json").unlink()
        die()

    if name in ("half a line", "step", "random"):
        saving.RunFolder.log = log_and_die
    elif name == "checkpoint":
        saving.torch.save = half_written
    elif name == "text":
        os.replace = die
    elif name == "before removal":
        saving.Path.rename = lambda path, to, rename=Path.rename: die() if to.suffix == ".old" else rename(path, to)
    elif name == "removal":
        saving.shutil.rmtree = lambda path, rmtree=shutil.rmtree, **how: (
            half_removed(path) if path.suffix == ".old" else rmtree(path, **how)
        )
    elif name == "model":
        saving.shutil.copyfile = die


def main() -> None:
    arguments = sys.argv[2:]
    out = Path(arguments[arguments.index("--out") + 1])
    for moment in json.loads(sys.argv[1]):
        child = os.fork()
        if child == 0:
            prepare(moment)
            os._exit(cli.main(arguments))
        if moment.startswith("random"):
            time.sleep(random.Random(moment).uniform(0.05, 1.0))
            os.kill(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        there = sorted(str(path.relative_to(out)) for path in out.rglob("*"))
        print(json.dumps({"moment": moment, "status": status, "there": there}), flush=True)


main()
