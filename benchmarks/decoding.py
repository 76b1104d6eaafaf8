"""What a wave and adaptive depth are worth: tokens a second beside plain decoding, by how often a draft holds.

    python benchmarks/decoding.py build/bench/melt-1.6b-4-int4 build/bench/melt-1.6b-4-int8 --json decoding.json
    python benchmarks/decoding.py build/melt-tiny --answers

Random weights say what a pass costs, not how often a draft holds: the share is forced here, from half to all of them
(one that does not hold is corrected by the last loop). ``--answers`` asks melt-tiny instead, on questions of 1 to 4
hops: how many passes and loops its answers take, and how many are right. Ways alternate within each round.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from melt_runtime import MeltModel
from melt_runtime.bench.measure import fill_cache, machine, new_process
from melt_runtime.cli.options import numbers_option
from melt_runtime.execute.executor import Executor
from melt_runtime.memory.buffers import State
from melt_runtime.memory.plan import plan_state
from melt_runtime.schedule.depth import Depth
from melt_runtime.schedule.span import Span
from melt_runtime.schedule.wave import Wave

LOOPS, CHUNK = 4, 32
SHARES = (0.5, 0.7, 0.8, 0.9, 1.0)
QUESTIONS = 200
ANSWERS: dict[str, dict[str, Any]] = {
    "plain, 4 loops": {"loops": 4},
    "wave, lag 1": {"loops": 4, "decode": "wave", "lag": 1},
    "wave, lag 2": {"loops": 4, "decode": "wave", "lag": 2},
    "wave, lag 3": {"loops": 4, "decode": "wave", "lag": 3},
    "auto, gate 0.9": {"loops": "auto", "exit_rule": "gate", "exit_threshold": 0.9},
    "auto, gate 0.5": {"loops": "auto", "exit_rule": "gate", "exit_threshold": 0.5},
    "auto, settled 0.05": {"loops": "auto", "exit_rule": "settled"},
    "auto, settled 0.01": {"loops": "auto", "exit_rule": "settled", "exit_threshold": 0.01},
}


@dataclass(frozen=True)
class WayRow:
    """One way to decode.

    Attributes:
        bundle: name of its folder.
        position: tokens in the cache at first.
        way: ``plain``, or ``wave`` with lag and share of drafts that hold.
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
    parser.add_argument("--answers", action="store_true", help="ask melt-tiny questions instead")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything")
    args = parser.parse_args()
    print("; ".join(f"{name} {value}" for name, value in machine().items()))
    if args.answers:
        for bundle in args.bundles:
            print_answers(bundle)
        return 0
    print(f"{LOOPS} loops, {args.rounds} rounds of {args.tokens} tokens\n")
    print(f"| bundle | position | way | passes a token | ms a token | of plain |\n{'|---' * 6}|")
    rows: list[WayRow] = []
    with new_process() as pool:
        for bundle in args.bundles:
            for position in args.positions:
                for row in pool.submit(measure, bundle, position, args.tokens, args.rounds).result():
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


def measure(bundle: Path, position: int, tokens: int, rounds: int) -> list[WayRow]:
    """Every way in turns, over the same state; in a process of its own."""
    model = MeltModel.load(bundle, device="cpu", capacity=64, loops=LOOPS)
    position = min(position, model.manifest.model.max_positions - tokens - 16)
    plan = plan_state(model.manifest, position + tokens + 16, chunk=CHUNK, loops=LOOPS)
    executor = Executor(model.new_runner().sessions, State(plan, "cpu"))
    fill_cache(executor.state, position)
    executor.slots[0].advance(position, LOOPS)
    ways: dict[str, Callable[[], int]] = {"plain": lambda: run_plain(executor, tokens)}
    for lag in (1, 2, 3) if executor.wave_obstacle is None else ():
        for share in SHARES if lag == 1 else (0.9,):
            ways[f"wave, lag {lag}, {share:.0%} hold"] = lambda lag=lag, share=share: run_wave(
                executor, tokens, lag, share
            )
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


def run_plain(executor: Executor, tokens: int) -> int:
    """Decodes tokens one after another; the passes that it took."""
    slot = executor.slots[0]
    for _ in range(tokens):
        span = Span(0, slot.length, [1], LOOPS)
        slot.flight = [span]
        while not span.is_done:
            executor.run([span])
        executor.compute_logits([span])[0].argmax()
        slot.commit()
    return tokens * LOOPS


def run_wave(executor: Executor, tokens: int, lag: int, share: float) -> int:
    """Decodes tokens in a wave in which a share of the drafts holds; the passes that it took."""
    slot, most = executor.slots[0], executor.state.plan.most_in_flight
    wave = Wave(0, Depth.fixed(LOOPS), lag, most, not executor.shares_cache)
    holds = np.random.default_rng(0).random(slot.length + tokens + 16) < share
    wave.start(slot.length, 1)
    logits: dict[Span, Any] = {}
    last = slot.length + tokens - 1

    def predict(span: Span, _: list[int]) -> int:
        logits[span].argmax()
        return 1 if holds[span.start] or span.is_done else 2

    passes = done = 0
    while done < tokens:
        slot.flight, running = wave.spans, wave.running
        executor.run(running)
        logits = dict(zip(running, executor.compute_logits(running), strict=True))
        passes += 1
        for _ in wave.advance(predict, lambda _: False, last):
            done += 1
            slot.commit()
    return passes


def print_answers(bundle: Path) -> None:
    """Questions of every number of hops, by every way: right answers, passes and loops a token."""
    from melt_models.tiny.task import make_problem

    model = MeltModel.load(bundle, device="cpu")
    print("\n| way | hops | right | loops of the name | of the rest | passes a token of the rest | drafts kept |")
    print(f"{'|---' * 7}|")
    for way, settings in ANSWERS.items():
        for hops in (1, 2, 3, 4):
            random = Random(hops)
            problems = [make_problem(random, held_out=True, questions=1, hops=(hops, hops)) for _ in range(QUESTIONS)]
            chats = [problem.messages() for problem in problems]
            results = [model.generate(chat[:1], **settings) for chat in chats]
            right = sum(result.text == chat[1]["content"] for result, chat in zip(results, chats, strict=True))
            tokens = sum(len(result.token_ids) - 1 for result in results)
            passes = sum(result.passes for result in results) / tokens
            first = sum(result.loops_per_token[0] for result in results) / QUESTIONS
            loops = sum(sum(result.loops_per_token[1:]) for result in results) / tokens
            drafts = [result.drafts for result in results if result.drafts is not None]
            kept = f"{sum(d.kept for d in drafts)} of {sum(d.made for d in drafts)}" if drafts else ""
            shares = f"{right / QUESTIONS:.1%} | {first:.2f} | {loops:.2f} | {passes:.2f}"
            print(f"| {way} | {hops} | {shares} | {kept} |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
