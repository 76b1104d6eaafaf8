"""What routing by conversation is worth: the share of turns whose past was in the cache of the replica that answered.

    python integrations/ray/benchmarks/cache_hits.py build/melt-tiny --conversations 12 --turns 6

Conversations of several turns, their order drawn anew, so many at a time, over 2 replicas; every turn but the first has
a past. Once with ``router: conversation``, once with ``router: load``, which is Ray's own rule: the less busy of two.
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

from melt_runtime.bench.measure import machine

CHATS = "/v1/chat/completions"
STORY = " ".join(f"{a} reports to {b}." for a, b in zip("ABCDEFGHIJKLMNOPQRSTU", "BCDEFGHIJKLMNOPQRSTUV", strict=True))


@dataclass
class Found:
    """What the turns with a past said."""

    turns: int = 0
    hits: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    seconds: list[float] = field(default_factory=list)


def converse(port: int, number: int, turns: int, found: Found, lock: threading.Lock) -> None:
    """One conversation to its end."""
    messages: list[dict[str, Any]] = [{"role": "user", "content": f"{number} {STORY} Who is one level above A?"}]
    for turn in range(turns):
        began = time.perf_counter()
        _, answer = ask(port, CHATS, {"messages": messages, "max_tokens": 8, "temperature": 0.0})
        seconds = time.perf_counter() - began
        usage = answer["usage"]
        with lock:
            if turn:
                cached = usage["prompt_tokens_details"]["cached_tokens"]
                found.turns, found.hits = found.turns + 1, found.hits + (cached > 0)
                found.prompt_tokens += usage["prompt_tokens"]
                found.cached_tokens += cached
                found.seconds.append(seconds)
        messages += [
            {"role": "assistant", "content": answer["choices"][0]["message"]["content"]},
            {"role": "user", "content": f"Who is one level above {STORY[16 * turn]}? {STORY}"},
        ]


def measure(port: int, conversations: int, turns: int, clients: int) -> Found:
    """All conversations, ``clients`` at a time."""
    found, lock = Found(), threading.Lock()
    numbers = random.Random(0).sample(range(1000), conversations)

    def run() -> None:
        while True:
            with lock:
                if not numbers:
                    return
                number = numbers.pop()
            converse(port, number, turns, found, lock)

    threads = [threading.Thread(target=run) for _ in range(clients)]
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
    parser.add_argument("--clients", type=int, default=4, help="at a time (default: %(default)s)")
    parser.add_argument("--slots", type=int, default=4, help="of a replica (default: %(default)s)")
    args = parser.parse_args()
    print("; ".join(f"{name} {value}" for name, value in machine().items()))
    print(f"\n| router | turns with a past | found in the cache | tokens not computed | turn, ms: p50 |\n{'|---' * 5}|")
    with local_ray(args.replicas + 1) as port:
        for router in ("conversation", "load"):
            sizes = {"slots": args.slots, "min_replicas": args.replicas, "max_replicas": args.replicas}
            # Another name is another deployment of replicas, whose caches are empty.
            deploy(bundle=args.bundle.resolve(), name=f"by-{router}", router=router, device="cpu", **sizes)
            found = measure(port, args.conversations, args.turns, args.clients)
            shares = f"{found.hits / found.turns:.0%} | {found.cached_tokens / found.prompt_tokens:.0%}"
            print(f"| {router} | {found.turns} | {shares} | {1e3 * statistics.median(found.seconds):.0f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
