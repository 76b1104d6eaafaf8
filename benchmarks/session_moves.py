"""What it takes to move a conversation to another process: bytes, and seconds to save, to restore, to compute it again.

    python benchmarks/session_moves.py build/bench/melt-1.6b-4-int8 build/bench/ouro-1.4b-4-int8 --loops 1,4

A conversation is that many random tokens and one new one. It is saved between two passes of a service, as
``POST /v1/sessions`` does, and restored into a service of another state over the same weights, which must then find it
in its cache. The file is read back from the system's memory, where it was just written: a network adds its own time.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from melt_runtime import GenerationConfig, MeltModel
from melt_runtime.bench.measure import machine, new_process
from melt_runtime.cli.options import names_option, numbers_option

NEW = 8
"""Tokens that the conversation goes on with after it moved."""


@dataclass(frozen=True)
class Move:
    """One conversation, moved several times.

    Attributes:
        bundle: name of its folder.
        loops: that its tokens took.
        kv_cache: how keys and values are stored.
        tokens: in the cache.
        bytes: of the file.
        save: seconds, the median.
        restore: the same.
        compute: seconds that the same takes without a file.
    """

    bundle: str
    loops: int
    kv_cache: str
    tokens: int
    bytes: int
    save: float
    restore: float
    compute: float


def measure(bundle: Path, loops: int, kv_cache: str, tokens: int, rounds: int, threads: int) -> Move:
    """Moves one conversation; in a process of its own."""
    sizes = {"capacity": tokens + NEW + 1, "loops": loops, "kv_cache": kv_cache, "threads": threads}
    models = [MeltModel.load(bundle, device="cpu", **sizes) for _ in range(2)]
    draw = random.Random(0)
    ids = [draw.randrange(5, 200) for _ in range(tokens)]
    one = GenerationConfig(loops=loops, max_new_tokens=1)
    saves, restores, size = [], [], 0
    with tempfile.TemporaryDirectory() as folder, models[0].new_service() as source, models[1].new_service() as target:
        path = Path(folder) / "moved.melt-session"
        began = time.perf_counter()
        source.submit(ids, one).wait()
        compute = time.perf_counter() - began
        for _ in range(rounds):
            began = time.perf_counter()
            kept = source.save(ids, path)
            saves.append(time.perf_counter() - began)
            began = time.perf_counter()
            assert target.restore(path) == kept
            restores.append(time.perf_counter() - began)
            size = path.stat().st_size
        found = target.submit([*ids, *range(5, 5 + NEW)], one).wait().cached_tokens
        assert found > tokens - models[1].session.plan.chunk, f"of {tokens} tokens {found} were found in the cache"
    return Move(
        bundle.name, loops, kv_cache, kept, size, statistics.median(saves), statistics.median(restores), compute
    )


def show(move: Move) -> str:
    """A line of the table."""
    times = " | ".join(f"{1e3 * value:.0f}" for value in (move.save, move.restore, move.compute))
    return f"| {move.bundle} | {move.loops} | {move.kv_cache} | {move.tokens} | {move.bytes / 1e6:.1f} | {times} |"


def main() -> int:
    """Prints a table as it is measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", type=Path, nargs="+", metavar="BUNDLE")
    parser.add_argument("--loops", type=numbers_option, default=(1, 2, 4), metavar="N,N", help="default: 1,2,4")
    parser.add_argument("--kv-cache", type=names_option, default=("float", "int8"), metavar="KIND,KIND")
    parser.add_argument("--tokens", type=int, default=1000, help="of the conversation (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="moves of each (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything")
    args = parser.parse_args()
    print("; ".join(f"{name} {value}" for name, value in machine().items()))
    print(f"\n| bundle | loops | KV cache | tokens | MB | save, ms | restore, ms | compute again, ms |\n{'|---' * 8}|")
    moves = []
    for bundle in args.bundles:
        for kv_cache in args.kv_cache:
            for loops in args.loops:
                with new_process() as pool:
                    sizes = (args.tokens, args.rounds, args.threads)
                    moves.append(pool.submit(measure, bundle, loops, kv_cache, *sizes).result())
                print(show(moves[-1]), flush=True)
    if args.json is not None:
        values = {"machine": machine(), "moves": [asdict(move) for move in moves]}
        args.json.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
