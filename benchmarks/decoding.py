"""What a wave and adaptive depth are worth: tokens a second beside plain decoding, by how often a draft holds.

    python benchmarks/decoding.py build/bench/melt-1.6b-4-int4 build/bench/melt-1.6b-4-int8 --json decoding.json

Random weights say what a pass costs, not how often a draft holds or when a token leaves: both are forced here. A draft
that does not hold is corrected by the last loop, the worst case, or where "early" is said by any but the first, evenly;
``auto`` takes two loops a token, by the exit gate, or as the rule ``settled`` does, with the head after each. Ways
alternate within each round. What melt-tiny makes of it is measured by ``benchmarks/answers.py``.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np

from melt_runtime import MeltModel
from melt_runtime.bench.forced import run_plain, run_wave
from melt_runtime.bench.measure import fill_cache, machine, new_process
from melt_runtime.cli.options import numbers_option
from melt_runtime.execute.executor import Executor
from melt_runtime.memory.buffers import State
from melt_runtime.memory.plan import Array, plan_state
from melt_runtime.schedule.span import Span

LOOPS, CHUNK = 4, 32
LAG_SHARE = 90
"""Percent of held drafts at which longer lags are measured."""


@dataclass(frozen=True)
class WayRow:
    """One way to decode.

    Attributes:
        bundle: name of its folder.
        position: tokens in the cache at first.
        way: ``plain``, ``auto`` with its rule, or ``wave`` with lag and share of drafts that hold.
        passes: loops of the graph for each token.
        seconds: for a token, median.
        ratio: tokens per second beside plain decoding in the same rounds, median.
    """

    bundle: str
    position: int
    way: str
    passes: float
    seconds: float
    ratio: float


def main() -> int:
    """Prints a table as it is measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", type=Path, nargs="+", metavar="BUNDLE")
    parser.add_argument("--positions", type=numbers_option, default=(100, 4000), metavar="N,N")
    parser.add_argument("--tokens", type=int, default=24, help="of each way in a round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--shares", type=numbers_option, default=(50, 70, 80, 90, 100), metavar="N,N", help="of drafts that hold, %%"
    )
    parser.add_argument("--lags", type=numbers_option, default=(1, 2, 3), metavar="N,N")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything")
    args = parser.parse_args()
    print("; ".join(f"{name} {value}" for name, value in machine().items()))
    print(f"{LOOPS} loops, {args.rounds} rounds of {args.tokens} tokens\n")
    print(f"| bundle | position | way | passes a token | ms a token | of plain |\n{'|---' * 6}|")
    rows: list[WayRow] = []
    with new_process() as pool:
        for bundle in args.bundles:
            for position in args.positions:
                sizes = (position, args.tokens, args.rounds)
                for row in pool.submit(measure, bundle, *sizes, args.shares, args.lags).result():
                    rows.append(row)
                    print(
                        f"| {row.bundle} | {row.position} | {row.way} | {row.passes:.2f} | {1e3 * row.seconds:.1f} | "
                        f"{row.ratio:.2f} |",
                        flush=True,
                    )
    if args.json is not None:
        values = {"machine": machine(), "loops": LOOPS, "rounds": args.rounds, "rows": [asdict(row) for row in rows]}
        args.json.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    return 0


def measure(
    bundle: Path, position: int, tokens: int, rounds: int, shares: tuple[int, ...], lags: tuple[int, ...]
) -> list[WayRow]:
    """Every way in turns, over the same state; in a process of its own."""
    model = MeltModel.load(bundle, device="cpu", capacity=64, loops=LOOPS)
    position = min(position, model.manifest.model.max_positions - tokens - 16)
    plan = plan_state(model.manifest, position + tokens + 16, chunk=CHUNK, loops=LOOPS)
    executor = Executor(model.new_runner().sessions, State(plan, "cpu"))
    fill_cache(executor.state, position)
    executor.slots[0].advance(position, LOOPS)
    ways: dict[str, Callable[[], int]] = {
        "plain": partial(run_plain, executor, [1] * tokens, LOOPS, np.argmax),
        "auto, gate, 2 loops": partial(run_plain, executor, [1] * tokens, 2, np.argmax),
        "auto, settled, 2 loops": partial(run_plain, executor, [1] * tokens, 2, np.argmax, after_each_loop=True),
    }
    for lag in lags:
        for share in shares if lag == 1 else (LAG_SHARE,):
            ways[f"wave, lag {lag}, {share}% hold"] = partial(run_forced, executor, tokens, lag, share)
    ways[f"wave, lag 1, {LAG_SHARE}% hold, early"] = partial(run_forced, executor, tokens, 1, LAG_SHARE, is_early=True)
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    passes = {}
    for turn in range(rounds + 1):
        for way, run in ways.items():
            begin = time.perf_counter()
            passes[way] = run() / tokens
            if turn:  # the first takes longer: memory is touched
                seconds[way].append((time.perf_counter() - begin) / tokens)
            executor.slots[0].truncate(position)
    return [
        WayRow(
            bundle=bundle.name,
            position=position,
            way=way,
            passes=passes[way],
            seconds=statistics.median(taken),
            ratio=statistics.median(plain / own for plain, own in zip(seconds["plain"], taken, strict=True)),
        )
        for way, taken in seconds.items()
    ]


def run_forced(executor: Executor, tokens: int, lag: int, share: int, is_early: bool = False) -> int:
    """Decodes tokens in a wave in which a share of the drafts, in percent, holds; the passes that it took."""
    misses = round(tokens * (100 - share) / 100)
    late = [LOOPS - number % (LOOPS - 1) if is_early else LOOPS for number in range(misses)]
    begin = executor.slots[0].length
    settles = dict(enumerate(np.random.default_rng(0).permutation([*late, *[1] * (tokens - misses)]), begin))

    def predict(span: Span, logits: Array) -> int:
        logits.argmax()
        return 1 if span.loop >= settles[span.start] else 2

    return run_wave(executor, 1, tokens, LOOPS, lag, predict)


if __name__ == "__main__":
    sys.exit(main())
