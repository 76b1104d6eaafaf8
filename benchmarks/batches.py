"""Many sequences at once: what a decoded token costs by how many share a pass, and whom a deep request keeps waiting.

    python benchmarks/batches.py build/bench/melt-1.6b-4-int4 build/bench/melt-1.6b-4-int8 --json batches.json

The bundles are those of ``melt bench --shape melt-1.6b:4 --precision int8``. Sizes of one position alternate within
each round, so that a slow moment of the machine meets all of them; a row is a median. The cache is filled without
computing it: speed depends on how many rows attention reads. What memory does not hold is left out.
"""

import argparse
import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from melt_runtime import GenerationConfig, MeltModel
from melt_runtime.bench.measure import fill_cache, machine, new_process
from melt_runtime.cli.options import numbers_option
from melt_runtime.execute.executor import Executor
from melt_runtime.memory.buffers import State
from melt_runtime.memory.estimate import format_bytes
from melt_runtime.memory.plan import plan_state
from melt_runtime.memory.process import available_bytes, resident_bytes
from melt_runtime.schedule.span import Span

LOOPS = 4
SLOTS, NEW_TOKENS = 8, 24


@dataclass(frozen=True)
class BatchRow:
    """A decoded token of each of ``batch`` sequences.

    Attributes:
        bundle: name of its folder.
        position: tokens in the cache of each.
        batch: sequences.
        seconds: of the step, median.
        tokens_per_second: of all together.
        ratio: tokens per second beside one sequence alone in the same rounds, median.
        state_bytes: of a state for as many slots.
        peak_bytes: of the process, which has the largest state.
    """

    bundle: str
    position: int
    batch: int
    seconds: float
    tokens_per_second: float
    ratio: float
    state_bytes: int
    peak_bytes: int


def main() -> int:
    """Prints a table as it is measured, then the shallow request among deep ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", type=Path, nargs="+", metavar="BUNDLE")
    parser.add_argument("--batches", type=numbers_option, default=(1, 2, 4, 8, 16), metavar="N,N")
    parser.add_argument("--positions", type=numbers_option, default=(100, 4000), metavar="N,N")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything")
    args = parser.parse_args()
    print("; ".join(f"{name} {value}" for name, value in machine().items()))
    print(f"{LOOPS} loops, {args.rounds} rounds\n")
    print("| bundle | position | batch | ms a step | tokens/s | of one alone | state | peak |")
    print(f"{'|---' * 8}|")
    rows: list[BatchRow] = []
    waits: dict[str, list[float]] = {}
    with new_process() as pool:
        for bundle in args.bundles:
            for position in args.positions:
                for row in pool.submit(measure, bundle, position, args.batches, args.rounds).result():
                    rows.append(row)
                    print(
                        f"| {row.bundle} | {row.position} | {row.batch} | {1e3 * row.seconds:.1f} | "
                        f"{row.tokens_per_second:.1f} | {row.ratio:.2f} | {format_bytes(row.state_bytes)} | "
                        f"{format_bytes(row.peak_bytes)} |",
                        flush=True,
                    )
        print(f"\n1 loop beside {SLOTS - 1} of {LOOPS}, over its time among {SLOTS} of 1 loop, {NEW_TOKENS} tokens:")
        for bundle in args.bundles:
            waits[bundle.name] = pool.submit(wait, bundle, args.rounds).result()
            found = sorted(waits[bundle.name])
            print(f"{bundle.name}: {statistics.median(found):.2f} ({found[0]:.2f}-{found[-1]:.2f})", flush=True)
    if args.json is not None:
        values = {"machine": machine(), "loops": LOOPS, "rounds": args.rounds, "waits": waits}
        values["rows"] = [asdict(row) for row in rows]
        args.json.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    return 0


def measure(bundle: Path, position: int, batches: tuple[int, ...], rounds: int) -> list[BatchRow]:
    """Steps of every size, in turns; in a process of its own."""
    model = MeltModel.load(bundle, device="cpu", capacity=64, loops=LOOPS)
    most = model.manifest.model.max_positions
    position = min(position, most - rounds - 3)
    plans = {batch: plan_state(model.manifest, position + rounds + 2, batch, chunk=1, loops=LOOPS) for batch in batches}
    free = available_bytes()
    batches = tuple(batch for batch in batches if free is None or plans[batch].total_bytes < 0.9 * free)
    executor = Executor(model.new_runner().sessions, State(plans[max(batches)], "cpu"))
    fill_cache(executor.state, position)
    for slot in executor.slots:
        slot.advance(position, LOOPS)
    seconds: dict[int, list[float]] = {batch: [] for batch in batches}
    for turn in range(rounds + 1):
        for batch in batches:
            begin = time.perf_counter()
            spans = [Span(number, position, [1], LOOPS) for number in range(batch)]
            for span in spans:
                executor.slots[span.slot].flight = [span]
            for _ in range(LOOPS):
                executor.run(spans)
            executor.compute_logits(spans)
            if turn:  # the first takes longer: memory is touched
                seconds[batch].append(time.perf_counter() - begin)
            for span in spans:
                executor.slots[span.slot].truncate(position)
    rows = []
    for batch, taken in seconds.items():
        ratios = [batch * alone / own for alone, own in zip(seconds[min(batches)], taken, strict=True)]
        middle = statistics.median(taken)
        rows.append(
            BatchRow(
                bundle=bundle.name,
                position=position,
                batch=batch,
                seconds=middle,
                tokens_per_second=batch / middle,
                ratio=statistics.median(ratios) / min(batches),
                state_bytes=plans[batch].total_bytes,
                peak_bytes=resident_bytes(),
            )
        )
    return rows


def wait(bundle: Path, rounds: int) -> list[float]:
    """How much longer a request of one loop takes beside deep ones than among its own kind; in a process of its own."""
    model = MeltModel.load(bundle, device="cpu", capacity=64, loops=LOOPS, slots=SLOTS)
    prompts = [[number + 1] for number in range(SLOTS)]

    def first(deep: int) -> float:
        """Seconds until the first prompt is answered."""
        depths = [1] + [deep] * (SLOTS - 1)
        configs = [GenerationConfig(loops=loops, max_new_tokens=NEW_TOKENS, stop_ids=()) for loops in depths]
        begin = time.perf_counter()
        with model.stream_batch(prompts, configs) as stream:
            for number, _ in stream:
                if number == 0:
                    break
        return time.perf_counter() - begin

    first(LOOPS)
    return [first(LOOPS) / first(1) for _ in range(rounds)]


if __name__ == "__main__":
    sys.exit(main())
