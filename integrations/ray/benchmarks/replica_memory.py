"""What replicas on one node share: resident memory of each, and its part of it where shared pages are divided.

    build/environments/ray/bin/python integrations/ray/benchmarks/replica_memory.py build/bench/melt-1.6b-4-int8

RSS counts a page in every process that has it, PSS divides it among them (/proc/PID/smaps_rollup, Linux). Each replica
has answered before it is looked at.
"""

import argparse
import sys
import time
from pathlib import Path

from local import ask, deploy, local_ray
from ray import serve

from melt_runtime.bench.measure import machine
from melt_runtime.cli.options import numbers_option

TITLE = b"ray::ServeReplica:default:engine"
FIELDS = ("Rss", "Pss", "Pss_File", "Private_Clean", "Private_Dirty", "Shared_Clean")


def replica_pids() -> list[int]:
    """The processes that are replicas of the engine."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_bytes().startswith(TITLE):
                found.append(int(path.parent.name))
        except OSError:  # it ended meanwhile
            continue
    return sorted(found)


def memory_of(pid: int) -> dict[str, int]:
    """Bytes of a process, by the names of smaps_rollup."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    values = {name: rest.split() for name, _, rest in (line.partition(":") for line in lines[1:])}
    return {name: int(values[name][0]) << 10 for name in FIELDS}


def main() -> int:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, metavar="BUNDLE")
    parser.add_argument("--replicas", type=numbers_option, default=(1, 2), metavar="N,N", help="default: 1,2")
    parser.add_argument("--slots", type=int, default=2, help="of a replica (default: %(default)s)")
    parser.add_argument("--capacity", type=int, default=512, help="of a slot (default: %(default)s)")
    args = parser.parse_args()
    print("; ".join(f"{name} {value}" for name, value in machine().items()))
    print(f"\n| replicas | {' | '.join(f'{name}, MB' for name in FIELDS)} |\n{'|---' * (len(FIELDS) + 1)}|")
    with local_ray(max(args.replicas) + 1) as port:
        for count in args.replicas:
            sizes = {"slots": args.slots, "capacity": args.capacity, "min_replicas": count, "max_replicas": count}
            deploy(bundle=args.bundle.resolve(), router="load", device="cpu", **sizes)
            seen: set[str] = set()
            while len(seen) < count:
                name, _ = ask(port, "/v1/completions", {"prompt": [5] * 40, "max_tokens": 4})
                seen.add(name)
            time.sleep(1)
            for pid in replica_pids():
                memory = memory_of(pid)
                print(f"| {count} | {' | '.join(f'{memory[name] / 1e6:.0f}' for name in FIELDS)} |", flush=True)
            serve.delete("default")
    return 0


if __name__ == "__main__":
    sys.exit(main())
