"""What reuse of a prompt's beginning saves, and what MELT's numbers lose where its chunks are made smaller for it.

    python benchmarks/reuse.py build/smollm2/int4-blocks-of-32-embedding-int8 \\
        --text benchmarks/texts/canal.txt --chunks 500
    python benchmarks/reuse.py build/melt-code-int8 --text runtime/melt_runtime/model.py --chunks 64,32,16,8

Turns: a prompt of ``--tokens`` tokens, then the same one again, a next turn behind its answer, and the same prompt with
another end, each through a service that answered the first one, beside a service that did not. Places: prompts of many
lengths from the text; the probabilities of the next token by each size of a chunk, beside those by the first size.
"""

import argparse
import json
import random
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from melt_runtime import GenerationConfig, MeltModel
from melt_runtime.bench.measure import machine
from melt_runtime.cli.options import numbers_option
from melt_runtime.memory.plan import Array

ANSWER, NEXT = 32, 30
"""Tokens of an answer, and of the user's next message."""
FREE = {"stop_ids": (), "temperature": 1.0}


@dataclass(frozen=True)
class Turn:
    """A prompt that begins like one that was answered.

    Attributes:
        bundle: name of its folder.
        chunk: size of the chunks.
        turn: what the prompt has in common with the first.
        tokens: of the prompt.
        computed: those of them that were computed.
        fresh: seconds to the first token where nothing is cached, median.
        reused: the same after the first prompt, median.
    """

    bundle: str
    chunk: int
    turn: str
    tokens: int
    computed: int
    fresh: float
    reused: float


@dataclass(frozen=True)
class Division:
    """Next tokens of prompts by the size of their chunks.

    Attributes:
        bundle: name of its folder.
        chunk: size of the chunks.
        places: number of prompts.
        equal: share of first choices equal to those of the first size.
        divergence: KL divergence of the probabilities from those of the first size, mean, in nats.
        perplexity: of the tokens that follow.
        seconds: of a prompt of average length, median.
    """

    bundle: str
    chunk: int
    places: int
    equal: float
    divergence: float
    perplexity: float
    seconds: float


def measure_turns(bundle: Path, ids: list[int], chunk: int, tokens: int, rounds: int) -> list[Turn]:
    """All turns, in turns."""
    sizes = {"capacity": tokens + ANSWER + NEXT + ANSWER, "chunk": chunk}
    models = [MeltModel.load(bundle, device="cpu", slots=1, **sizes) for _ in range(2)]
    answer = GenerationConfig(max_new_tokens=ANSWER, **FREE, seed=0)
    first = ids[:tokens]
    found: dict[str, list[tuple[int, int, float, float]]] = {}
    with models[0].new_service() as cold, models[1].new_service() as warm:
        for _ in range(rounds):
            said = list(warm.submit(first, answer).wait().token_ids)
            prompts = {
                "again": first,
                "next turn": [*first, *said, *ids[tokens : tokens + NEXT]],
                "last quarter edited": [*first[: 3 * tokens // 4], *ids[tokens : tokens + tokens // 4]],
            }
            for turn, prompt in prompts.items():
                warm.submit(first, answer).wait()
                cold.submit([ids[-1]], one_token()).wait()
                results = []
                for service in (cold, warm):
                    began = time.perf_counter()
                    result = service.submit(prompt, one_token()).wait()
                    results.append((result.cached_tokens, time.perf_counter() - began))
                (none, fresh), (cached, reused) = results
                assert none == 0
                found.setdefault(turn, []).append((len(prompt), len(prompt) - cached, fresh, reused))
    return [
        Turn(bundle.name, chunk, turn, *rows[0][:2], *(statistics.median(row[at] for row in rows) for at in (2, 3)))
        for turn, rows in found.items()
    ]


def one_token() -> GenerationConfig:
    """Settings of an answer that ends with its first token."""
    return GenerationConfig(max_new_tokens=1, **FREE, seed=0)


def measure_divisions(
    bundle: Path, ids: list[int], chunks: tuple[int, ...], tokens: int, places: int
) -> list[Division]:
    """Each size of a chunk over the same prompts."""
    draw = random.Random(0)
    ends = [draw.randrange(tokens // 2, tokens) for _ in range(places)]
    starts = [draw.randrange(len(ids) - end) for end in ends]
    loops = MeltModel.load(bundle, device="cpu").manifest.model.trained_loops
    reference: list[Array] = []
    divisions = []
    for chunk in chunks:
        runner = MeltModel.load(bundle, device="cpu", capacity=max(tokens, *chunks), chunk=chunk).new_runner()
        logs, seconds = [], []
        for start, end in zip(starts, ends, strict=True):
            runner.reset()
            began = time.perf_counter()
            logs.append(log_softmax(runner.prefill(ids[start : start + end], loops)))
            seconds.append(time.perf_counter() - began)
        reference = reference or logs
        following = [ids[start + end] for start, end in zip(starts, ends, strict=True)]
        pairs = list(zip(reference, logs, strict=True))
        divisions.append(
            Division(
                bundle=bundle.name,
                chunk=chunk,
                places=places,
                equal=statistics.mean(int(ours.argmax() == theirs.argmax()) for theirs, ours in pairs),
                divergence=statistics.mean(float((np.exp(t) * (t - o)).sum()) for t, o in pairs),
                perplexity=float(
                    np.exp(-statistics.mean(float(log[token]) for log, token in zip(logs, following, strict=True)))
                ),
                seconds=statistics.median(seconds),
            )
        )
    return divisions


def log_softmax(logits: Array) -> Array:
    """Logarithms of probabilities, [V] float64."""
    values: Array = logits.astype(np.float64) - float(logits.max())
    return values - np.log(np.exp(values).sum())


def main() -> int:
    """Prints both tables as they are measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="text of the prompts")
    parser.add_argument("--chunks", type=numbers_option, default=(64, 32), metavar="N,N", help="sizes of a chunk")
    parser.add_argument("--tokens", type=int, default=466, help="tokens of a prompt (default: %(default)s)")
    parser.add_argument("--places", type=int, default=200, help="prompts of the second table (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="of the first table (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything")
    args = parser.parse_args()
    ids = MeltModel.load(args.bundle, device="cpu").codec.encode(args.text.read_text(encoding="utf-8"))
    print("; ".join(f"{name} {value}" for name, value in machine().items()))
    print(f"\n| bundle | chunk | prompt | tokens | computed | ms, nothing cached | ms |\n{'|---' * 7}|")
    turns = [turn for chunk in args.chunks for turn in measure_turns(args.bundle, ids, chunk, args.tokens, args.rounds)]
    for turn in turns:
        times = f"{1e3 * turn.fresh:.1f} | {1e3 * turn.reused:.1f}"
        print(f"| {turn.bundle} | {turn.chunk} | {turn.turn} | {turn.tokens} | {turn.computed} | {times} |")
    print(f"\n| bundle | chunk | first choice equal | KL divergence | perplexity | ms a prompt |\n{'|---' * 6}|")
    divisions = measure_divisions(args.bundle, ids, args.chunks, args.tokens, args.places)
    for one in divisions:
        print(
            f"| {one.bundle} | {one.chunk} | {one.equal:.1%} | {one.divergence:.2g} | {one.perplexity:.2f} | "
            f"{1e3 * one.seconds:.1f} |"
        )
    if args.json is not None:
        values = {
            "machine": machine(),
            "turns": [asdict(t) for t in turns],
            "divisions": [asdict(d) for d in divisions],
        }
        args.json.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
