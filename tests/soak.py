"""What must hold for days, in minutes: ``python tests/soak.py``; exit status 1 where a promise is broken.

tokens   100,000 tokens in one process, turn after turn at every depth: memory flat, the work of a token the same
loads    1,000 loads and answers of the same bundle in one process: memory flat, the answer the same
serving  20,000 requests of 64 clients to one server: its memory flat, every answer the one of its depth
cache    processes that make and remove the entries of one load cache under each other: every answer right, nothing left

Memory is address space, private and writable, and work is counted in calls: no other process changes these, as it does
resident memory and time.
"""

import argparse
import gc
import http.client
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median

from address_space import mapped_bytes

from melt_runtime import MeltModel
from melt_runtime.cli.demo import BUNDLE
from melt_runtime.loading.load_cache import LoadCache

QUESTION = "Ana reports to Ben. Cleo reports to Ana. Ben works for Dan. Who is two levels above Cleo?"
DEPTHS = (1, 2, 3, 4)
MOST_GROWTH = 8_000_000  # bytes, from a tenth of the way to the end
PROCESSES = 3
CLIENTS = 64


def main(argv: list[str] | None = None) -> int:
    """Runs the parts asked for; a line for each, and what it broke."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=100_000, help="0: not this part (default: %(default)s)")
    parser.add_argument("--loads", type=int, default=1000, help="(default: %(default)s)")
    parser.add_argument("--cache", type=int, default=100, help="rounds of each process (default: %(default)s)")
    parser.add_argument("--serving", type=int, default=20_000, help="requests (default: %(default)s)")
    parser.add_argument("--bundle", type=Path, default=BUNDLE, help="(default: the one in the package)")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker is not None:
        return share_cache(args.bundle, args.worker, args.cache)
    broken: list[str] = []
    parts = (
        (args.tokens, soak_tokens),
        (args.loads, soak_loads),
        (args.serving, soak_serving),
        (args.cache, soak_cache),
    )
    for count, part in parts:
        if count:
            started = time.monotonic()
            line, faults = part(args.bundle, count)
            print(f"{line}; {time.monotonic() - started:.0f} s", flush=True)
            broken += faults
    print("\n".join(f"BROKEN: {fault}" for fault in broken) or "every promise held")
    return 1 if broken else 0


def soak_tokens(bundle: Path, count: int) -> tuple[str, list[str]]:
    """Rounds of the same turns: at each depth a conversation of four turns, one of them sampled."""
    model = load(bundle)
    session = model.new_session()
    done, sizes, costs = 0, [], []

    def play() -> int:
        tokens = 0
        for depth in DEPTHS:
            session.reset()
            for turn in range(4):
                more = {"temperature": 0.8, "top_p": 0.9, "seed": turn} if turn == 3 else {}
                answer = session.generate(QUESTION, raw=True, loops=depth, max_new_tokens=60, stop_ids=(), **more)
                tokens += len(answer.token_ids)
        return tokens

    play()  # what is made at the first use
    first = calls_of(play)
    while done < count:
        started, before = time.process_time(), done
        done += play()
        costs.append((time.process_time() - started) / (done - before))
        sizes.append(mapped_bytes())
        show("tokens", done, count)
    last = calls_of(play)
    tenth = max(1, len(costs) // 10)
    line = (
        f"{done} tokens in {len(costs)} rounds: memory {sizes[tenth - 1] / 1e6:.1f} MB after a tenth, "
        f"{sizes[-1] / 1e6:.1f} MB at the end; {median(costs[:tenth]) * 1e3:.3f} ms of processor time a token in the "
        f"first tenth, {median(costs[-tenth:]) * 1e3:.3f} ms in the last (medians); {last} calls in the last round"
    )
    return line, [
        *faults_of_growth("tokens", sizes[-1] - sizes[tenth - 1]),
        *([f"tokens: {last} calls in the last round, {first} in the first"] if last != first else []),
    ]


def calls_of(play: Callable[[], object]) -> int:
    """Calls of Python's and C's functions, this thread's."""
    calls = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    gc.collect()
    gc.disable()  # what it finalizes depends on what came before
    sys.setprofile(count)
    try:
        play()
    finally:
        sys.setprofile(None)
        gc.enable()
    return calls


def soak_loads(bundle: Path, count: int) -> tuple[str, list[str]]:
    """The same bundle again and again, an answer each time."""
    sizes, faults, expected = [], [], None
    for number in range(count):
        answer = load(bundle).generate(QUESTION, max_new_tokens=3).token_ids
        expected = expected or answer
        if answer != expected:
            faults.append(f"loads: another answer from load {number}")
        gc.collect()
        sizes.append(mapped_bytes())
        show("loads", number + 1, count)
    early = sizes[max(1, count // 10) - 1]
    line = f"{count} loads: memory {early / 1e6:.1f} MB after a tenth, {sizes[-1] / 1e6:.1f} MB at the end"
    return line, faults + faults_of_growth("loads", sizes[-1] - early)


def soak_serving(bundle: Path, count: int) -> tuple[str, list[str]]:
    """Clients that ask one server again and again, at every depth; some go away before their answer."""
    command = [sys.executable, "-m", "melt_runtime", "serve", str(bundle), "--port", "0", "--capacity", "256"]
    server = subprocess.Popen([*command, "--device", "cpu"], stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    port = next(int(line.rsplit(":", 1)[1]) for line in server.stderr if line.startswith("listening on "))
    answers: dict[int, set[str]] = {depth: set() for depth in DEPTHS}
    done, sizes, lock = [0], [], threading.Lock()

    def ask(connection: http.client.HTTPConnection, depth: int) -> str:
        body = {"messages": [{"role": "user", "content": QUESTION}], "loops": depth}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        text: str = json.loads(connection.getresponse().read())["choices"][0]["message"]["content"]
        return text

    def run(client: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        for number in range(count // CLIENTS):
            depth = DEPTHS[(number + client) % len(DEPTHS)]
            answers[depth].add(ask(connection, depth))
            if number % 50 == 0:
                connection.close()  # and in the middle of one, too
                connection.request("POST", "/v1/completions", b'{"prompt": "a"}', {"Content-Type": "application/json"})
                connection.close()
            with lock:
                done[0] += 1
                if done[0] % (count // 20) == 0:
                    sizes.append(mapped_bytes(pid=server.pid))
                    show("serving", done[0], count)

    clients = [threading.Thread(target=run, args=(client,)) for client in range(CLIENTS)]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    server.terminate()
    server.wait()
    line = f"{done[0]} requests: memory {sizes[1] / 1e6:.1f} MB after a tenth, {sizes[-1] / 1e6:.1f} MB at the end"
    several = [f"serving: {len(found)} answers at depth {depth}" for depth, found in answers.items() if len(found) != 1]
    return line, [*faults_of_growth("serving", sizes[-1] - sizes[1]), *several]


def soak_cache(bundle: Path, count: int) -> tuple[str, list[str]]:
    """Processes that share one folder."""
    with tempfile.TemporaryDirectory(prefix="melt-soak-") as place:
        folder = Path(place) / "cache"
        command = [sys.executable, __file__, "--cache", str(count), "--bundle", str(bundle), "--worker", str(folder)]
        workers = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(PROCESSES)]
        errors = [worker.communicate()[1] for worker in workers]
        faults = [
            f"cache: a process ended with status {worker.returncode}: {error[-2000:]}"
            for worker, error in zip(workers, errors, strict=True)
            if worker.returncode
        ]
        left = LoadCache(folder).clear().left
        if left or folder.exists():
            faults.append(f"cache: {[path.name for path in left]} remained after clearing")
    line = f"{PROCESSES} processes, {count} times each, made, used and removed entries of one load cache"
    return line, faults


def share_cache(bundle: Path, folder: Path, count: int) -> int:
    """One process of several: loads through the cache, answers, and removes an entry, all of them or none."""
    warnings.simplefilter("ignore")  # that an entry is deleted again and again, which is what happens here
    cache, chance = LoadCache(folder, min_bytes=0), random.Random()
    expected = load(bundle).generate(QUESTION, max_new_tokens=3).token_ids
    for _ in range(count):
        if load(bundle, cache).generate(QUESTION, max_new_tokens=3).token_ids != expected:
            print("another answer through the cache", file=sys.stderr)
            return 1
        how: Callable[[], object] = chance.choice((cache.clear, lambda: None, lambda: remove_one(cache, chance)))
        how()
    return 0


def remove_one(cache: LoadCache, chance: random.Random) -> None:
    entries = cache.entries()
    if entries:
        cache.remove(chance.choice(entries).folder.name)


def load(bundle: Path, cache: LoadCache | None = None) -> MeltModel:
    return MeltModel.load(bundle, device="cpu", threads=1, cache=cache)


def faults_of_growth(part: str, growth: int) -> list[str]:
    return [f"{part}: memory grew by {growth / 1e6:.1f} MB"] if growth > MOST_GROWTH else []


def show(what: str, done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{what}: {done} of {total}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
