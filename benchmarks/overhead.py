"""What the driver costs: a decoded step less the time inside ONNX Runtime, and how memory is shared by processes.

python benchmarks/overhead.py BUNDLE [--loops 4]
"""

import argparse
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

from melt_runtime import MeltModel
from melt_runtime.memory.estimate import format_bytes
from melt_runtime.runner import LoopRunner

STEPS = 30


class Timed:
    """A session that sums the time of its runs."""

    def __init__(self, session):
        self._session = session
        self.seconds = 0.0

    def run_with_iobinding(self, binding, options) -> None:
        """Runs and counts."""
        begin = time.perf_counter()
        self._session.run_with_iobinding(binding, options)
        self.seconds += time.perf_counter() - begin

    def io_binding(self):
        """The session's own."""
        return self._session.io_binding()


def main() -> int:
    """Prints the overhead, then the memory of one process and of two at once."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--loops", type=int, default=4)
    parser.add_argument("--capacity", type=int, default=2048)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    begin = time.perf_counter()
    model = MeltModel.load(args.bundle, device="cpu", capacity=args.capacity)
    load = time.perf_counter() - begin
    model.generate([5] * 100, loops=args.loops, max_new_tokens=16, stop_ids=())
    if args.child:
        print("ready", flush=True)
        sys.stdin.readline()
        return 0
    weights, state = format_bytes(model.manifest.weight_bytes), format_bytes(model.state_bytes)
    print(f"load {load:.2f} s; weights {weights}, state {state}")
    print_overhead(model, args.loops)
    print_memory("one process", "self")
    command = [sys.executable, __file__, str(args.bundle), "--loops", str(args.loops), "--capacity", str(args.capacity)]
    other = subprocess.Popen([*command, "--child"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    other.stdout.readline()
    print_memory("two processes, this one", "self")
    print_memory("two processes, the other", str(other.pid))
    other.communicate("\n")
    return 0


def print_overhead(model: MeltModel, loops: int) -> None:
    """A decoded step, and the part of it outside of ONNX Runtime."""
    plain = model.new_runner()
    timed = {name: Timed(getattr(plain.sessions, name)) for name in ("embed", "loop", "head")}
    sessions = replace(plain.sessions, **timed)
    runner = LoopRunner(sessions, plain.state)
    steps, outside = [], []
    for _ in range(STEPS):
        inside = -sum(getattr(sessions, name).seconds for name in ("embed", "loop", "head"))
        begin = time.perf_counter()
        runner.decode([5], loops)
        steps.append(time.perf_counter() - begin)
        inside += sum(getattr(sessions, name).seconds for name in ("embed", "loop", "head"))
        outside.append(steps[-1] - inside)
    step, python = statistics.median(steps), statistics.median(outside)
    share = f"{1e6 * python:.0f} us ({100 * python / step:.2f} %)"
    print(f"decode with {loops} loops: {1e3 * step:.2f} ms, of which Python {share}")


def print_memory(label: str, process: str) -> None:
    """Resident, private and proportional bytes of a process, from the kernel (Linux)."""
    found = {}
    for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:]:
        name, amount = line.split(":")
        found[name] = 1024 * int(amount.split()[0])
    private = found["Private_Clean"] + found["Private_Dirty"]
    amounts = {"resident": found["Rss"], "anonymous": found["Anonymous"], "private": private, "share": found["Pss"]}
    print(f"{label}: " + ", ".join(f"{name} {format_bytes(count)}" for name, count in amounts.items()))


if __name__ == "__main__":
    sys.exit(main())
