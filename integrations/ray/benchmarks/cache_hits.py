"""What routing by conversation is worth: the share of turns whose past was in the cache of the replica that answered.

    build/environments/ray/bin/python integrations/ray/benchmarks/cache_hits.py build/melt-tiny --conversations 16

A turn's past is the prompt of the turn before; it is found where all its whole chunks were cached. Conversations of
several turns, so many at a time, over 2 replicas. Between two turns a client thinks: without that the replica that has
just answered it would be the less busy one by itself. Once with ``router: conversation``, once with ``router: load``,
which is Ray's own rule: the less busy of two. On a cluster: RAY_ADDRESS=auto, on a node that has an HTTP proxy.
"""

import argparse
import random
import statistics
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from local import ask, deploy, local_ray

from melt_runtime import read_manifest
from melt_runtime.bench.measure import machine

CHATS = "/v1/chat/completions"
STORY = " ".join(f"{a} reports to {b}." for a, b in zip("ABCDEFGHIJKLMNOPQRSTU", "BCDEFGHIJKLMNOPQRSTUV", strict=True))


@dataclass(frozen=True)
class Sizes:
    """Of a measurement; ``think`` is seconds between two turns, ``chunk`` the model's tokens."""

    conversations: int
    turns: int
    clients: int
    think: float
    tokens: int
    chunk: int


@dataclass
class Found:
    """What the turns with a past said."""

    turns: int = 0
    hits: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    new_tokens: int = 0
    seconds: list[float] = field(default_factory=list)


def converse(port: int, number: int, sizes: Sizes, found: Found, lock: threading.Lock) -> None:
    """One conversation to its end."""
    draw = random.Random(number)
    messages: list[dict[str, Any]] = [{"role": "user", "content": f"{number} {STORY} Who is one level above A?"}]
    past = 0
    for turn in range(sizes.turns):
        time.sleep(draw.uniform(0, 2 * sizes.think))
        began = time.perf_counter()
        _, answer = ask(port, CHATS, {"messages": messages, "max_tokens": sizes.tokens, "temperature": 0.0})
        seconds = time.perf_counter() - began
        usage = answer["usage"]
        with lock:
            found.new_tokens += usage["completion_tokens"]
            if turn:
                cached = usage["prompt_tokens_details"]["cached_tokens"]
                found.turns, found.hits = found.turns + 1, found.hits + (cached >= past // sizes.chunk * sizes.chunk)
                found.prompt_tokens += usage["prompt_tokens"]
                found.cached_tokens += cached
                found.seconds.append(seconds)
        past = usage["prompt_tokens"]
        messages += [
            {"role": "assistant", "content": answer["choices"][0]["message"]["content"]},
            {"role": "user", "content": f"Who is one level above {STORY[16 * turn]}? {STORY} {STORY}"},
        ]


def measure(port: int, sizes: Sizes) -> Found:
    """All conversations, ``clients`` at a time."""
    found, lock = Found(), threading.Lock()
    numbers = random.Random(0).sample(range(1000), sizes.conversations)

    def run() -> None:
        while True:
            with lock:
                if not numbers:
                    return
                number = numbers.pop()
            converse(port, number, sizes, found, lock)

    threads = [threading.Thread(target=run) for _ in range(sizes.clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def main() -> int:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, metavar="BUNDLE")
    parser.add_argument("--replicas", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--conversations", type=int, default=12, help="default: %(default)s")
    parser.add_argument("--turns", type=int, default=6, help="of each (default: %(default)s)")
    parser.add_argument("--clients", type=int, default=8, help="at a time (default: %(default)s)")
    parser.add_argument("--think", type=float, default=0.5, help="seconds between turns (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=8, help="of an answer, at most (default: %(default)s)")
    parser.add_argument("--slots", type=int, default=8, help="of a replica (default: %(default)s)")
    args = parser.parse_args()
    print("; ".join(f"{name} {value}" for name, value in machine().items()))
    titles = ("router", "turns with a past", "found in the cache", "tokens not computed", "turn, ms: p50", "tokens/s")
    print(f"\n| {' | '.join(titles)} |\n{'|---' * len(titles)}|")
    chunk = read_manifest(args.bundle).model.trained_chunk
    sizes = Sizes(args.conversations, args.turns, args.clients, args.think, args.tokens, chunk)
    with local_ray(args.replicas + 1) as port:
        for router in ("conversation", "load"):
            replicas = {"slots": args.slots, "min_replicas": args.replicas, "max_replicas": args.replicas}
            # Another name is another deployment of replicas, whose caches are empty.
            deploy(bundle=args.bundle.resolve(), name=f"by-{router}", router=router, device="cpu", **replicas)
            began = time.perf_counter()
            found = measure(port, sizes)
            rate = found.new_tokens / (time.perf_counter() - began)
            shares = f"{found.hits / found.turns:.0%} | {found.cached_tokens / found.prompt_tokens:.0%}"
            middle = 1e3 * statistics.median(found.seconds)
            print(f"| {router} | {found.turns} | {shares} | {middle:.0f} | {rate:.1f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
