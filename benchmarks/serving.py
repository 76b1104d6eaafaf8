"""What a server is worth: tokens a second, time to the first token and between tokens, by clients at once.

    python benchmarks/serving.py build/bench/melt-1.6b-4-int8 build/bench/melt-1.6b-4-int4 --json serving.json
    python benchmarks/serving.py build/smollm2/int4-blocks-of-32-embedding-int8 \\
        --peer build/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --json serving-smollm2.json

The second beside llama-cpp-python's server over the same model (``benchmarks/peers/install.sh``), which answers one
request after another. Each bundle is served by ``melt serve`` in a process of its own; the clients are threads here,
which ask again as soon as they are answered. "in process" is ``MeltModel.generate`` without any server, one answer
after another. Answers have a fixed length: no token ends them.
"""

import argparse
import contextlib
import http.client
import json
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from melt_runtime import MeltModel
from melt_runtime.bench.measure import machine, new_process
from melt_runtime.cli.options import numbers_option
from melt_runtime.request.generation_files import read_generation_config

CAPACITY, LONG_PROMPT, NEW_TOKENS = 2304, 2000, 20
PEER = "llama-cpp-python"
HEADERS = {"Content-Type": "application/json"}


@dataclass(frozen=True)
class LoadRow:
    """So many clients at once.

    Attributes:
        bundle: name of its folder.
        clients: at once; 0: in process, without a server.
        rate: tokens of answers a second, all clients together.
        first: seconds to the first token, median and 99th percentile.
        between: seconds from one token to the next, the same.
    """

    bundle: str
    clients: int
    rate: float
    first: tuple[float, float]
    between: tuple[float, float]


@dataclass(frozen=True)
class Timed:
    """When the request was sent, and when each token came."""

    asked: float
    tokens: list[float]


@contextlib.contextmanager
def serving_peer(model: Path, threads: int) -> Iterator[int]:
    """The port of llama-cpp-python's server."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    command = ["build/peers/venv/bin/python", "-m", "llama_cpp.server", "--model", str(model), "--port", str(port)]
    command += ["--n_ctx", str(CAPACITY), "--n_threads", str(threads), "--n_threads_batch", str(threads)]
    command += ["--interrupt_requests", "false"]  # else a request ends the one before it
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            assert server.poll() is None, "llama-cpp-python's server ended: benchmarks/peers/install.sh"
            time.sleep(0.1)
        yield port
    finally:
        server.kill()
        server.wait()


@contextlib.contextmanager
def serving(bundle: Path, slots: int, threads: int) -> Iterator[int]:
    """The port of a server of its own."""
    command = [sys.executable, "-m", "melt_runtime", "serve", str(bundle), "--port", "0", "--device", "cpu"]
    command += ["--slots", str(slots), "--capacity", str(CAPACITY), "--threads", str(threads)]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    try:
        for line in server.stderr:
            if line.startswith("listening on "):
                break
        yield int(line.rsplit(":", 1)[1])
    finally:
        server.kill()
        server.wait()


def ask(port: int, prompt: list[int] | str, tokens: int, stop_ids: list[int]) -> Timed:
    """Streams one answer."""
    body = {"prompt": prompt, "max_tokens": tokens, "stream": True, "logit_bias": {str(t): -100 for t in stop_ids}}
    connection = http.client.HTTPConnection("127.0.0.1", port)
    with contextlib.closing(connection):
        asked, found = time.perf_counter(), []
        connection.request("POST", "/v1/completions", json.dumps(body), HEADERS)
        response = connection.getresponse()
        assert response.status == 200, response.read()
        for line in response:
            if line.startswith(b"data: {"):
                (choice,) = json.loads(line[6:])["choices"]
                # The peer does not say how many tokens a chunk has: one, but for those without text.
                count = len(choice["loops"]) if "loops" in choice else bool(choice["text"])
                found += [time.perf_counter()] * count
    assert 0.9 * tokens <= len(found) <= tokens, found
    return Timed(asked, found)


def run_clients(
    port: int, clients: int, requests: int, prompt: int, tokens: int, stop_ids: list[int], is_text: bool = False
) -> list[Timed]:
    """Every client asks so many times, one after another."""
    found: list[Timed] = []

    def run(client: int) -> None:
        for number in range(requests):
            ids = [(7 * place + 31 * client + 101 * number) % 200 for place in range(prompt)]
            found.append(ask(port, " ".join(map(str, ids)) if is_text else ids, tokens, stop_ids))

    threads = [threading.Thread(target=run, args=(client,)) for client in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def row_of(bundle: str, clients: int, found: list[Timed]) -> LoadRow:
    """The figures of a run."""
    began, ended = min(one.asked for one in found), max(one.tokens[-1] for one in found)
    first = [one.tokens[0] - one.asked for one in found]
    between = [later - before for one in found for before, later in zip(one.tokens, one.tokens[1:], strict=False)]
    rate = sum(len(one.tokens) for one in found) / (ended - began)
    return LoadRow(bundle, clients, rate, _percentiles(first), _percentiles(between))


def _percentiles(seconds: list[float]) -> tuple[float, float]:
    ranked = sorted(seconds)
    return statistics.median(ranked), ranked[min(len(ranked) - 1, int(0.99 * len(ranked)))]


def in_process(bundle: Path, requests: int, prompt: int, tokens: int, threads: int) -> list[Timed]:
    """The same answers without a server."""
    model = MeltModel.load(bundle, device="cpu", capacity=CAPACITY, threads=threads)
    bias = dict.fromkeys(model.defaults.stop_ids or (), -100.0)
    found = []
    for number in range(requests + 1):
        ids = [(7 * place + 101 * number) % 200 for place in range(prompt)]
        asked, times = time.perf_counter(), []
        model.generate(ids, max_new_tokens=tokens, logit_bias=bias, logits_processors=[_timer(times)])
        found.append(Timed(asked, times))
    return found[1:]


def _timer(times: list[float]) -> Any:
    def note(_: object, logits: Any) -> Any:
        times.append(time.perf_counter())
        return logits

    return note


def measure_peer(model: Path, clients: tuple[int, ...], sizes: tuple[int, int, int, int], stop_ids: list[int]) -> list:
    """The same clients of llama-cpp-python's server."""
    requests, prompt, tokens, threads = sizes
    rows = []
    with serving_peer(model, threads) as port:
        run_clients(port, 1, 1, prompt, tokens, stop_ids, is_text=True)
        for count in clients:
            found = run_clients(port, count, requests, prompt, tokens, stop_ids, is_text=True)
            rows.append(row_of(PEER, count, found))
            print(show(rows[-1]), flush=True)
    return [asdict(row) for row in rows]


def measure(
    bundle: Path, clients: tuple[int, ...], requests: int, prompt: int, tokens: int, threads: int, is_text: bool
) -> dict:
    """Everything of one bundle."""
    with new_process() as pool:
        alone = pool.submit(in_process, bundle, requests, prompt, tokens, threads).result()
    stop_ids = _stop_ids(bundle)
    rows = [row_of(bundle.name, 0, alone)]
    print(show(rows[0]), flush=True)
    with serving(bundle, max(clients), threads) as port:
        run_clients(port, 1, 1, prompt, tokens, stop_ids)
        for count in clients:
            found = run_clients(port, count, requests, prompt, tokens, stop_ids, is_text)
            rows.append(row_of(bundle.name, count, found))
            print(show(rows[-1]), flush=True)
    with serving(bundle, 9, threads) as port:
        short = [5] * 8
        ask(port, [9] * 8, 2, stop_ids)
        lone = ask(port, [6, *short], 2, stop_ids)
        others = threading.Thread(target=run_clients, args=(port, 8, 1, 8, 200, stop_ids))
        others.start()
        time.sleep(3)
        crowded = [ask(port, [number, *short], 2, stop_ids) for number in range(7, 15)]
        others.join()
        past = [(7 * place) % 200 for place in range(LONG_PROMPT)]
        first = ask(port, past, 2, stop_ids)
        again = ask(port, past + [3] * NEW_TOKENS, 2, stop_ids)
    waits = {
        "alone": lone.tokens[0] - lone.asked,
        "beside 8": statistics.median(one.tokens[0] - one.asked for one in crowded),
        f"{LONG_PROMPT} tokens": first.tokens[0] - first.asked,
        f"{LONG_PROMPT} tokens again, {NEW_TOKENS} new": again.tokens[0] - again.asked,
    }
    print("\ntime to the first token: " + "; ".join(f"{name} {1e3 * value:.0f} ms" for name, value in waits.items()))
    return {"rows": [asdict(row) for row in rows], "first_token": waits}


def _stop_ids(bundle: Path) -> list[int]:
    return [*(read_generation_config(bundle / "generation_config.json").stop_ids or ())]


def show(row: LoadRow) -> str:
    """A line of the table."""
    cells = [f"{1e3 * one:.0f} / {1e3 * other:.0f}" for one, other in (row.first, row.between)]
    who = "in process, 1" if row.clients == 0 else str(row.clients)
    return f"| {row.bundle} | {who} | {row.rate:.1f} | {' | '.join(cells)} |"


def main() -> int:
    """Prints a table as it is measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", type=Path, nargs="+", metavar="BUNDLE")
    parser.add_argument("--clients", type=numbers_option, default=(1, 2, 4, 8, 16, 32), metavar="N,N")
    parser.add_argument("--requests", type=int, default=3, help="of each client (default: %(default)s)")
    parser.add_argument("--prompt", type=int, default=32, help="tokens (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=48, help="of each answer (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="of the server (default: %(default)s)")
    parser.add_argument(
        "--peer", type=Path, metavar="GGUF", help="the same model for llama-cpp-python; prompts are texts"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything")
    args = parser.parse_args()
    print("; ".join(f"{name} {value}" for name, value in machine().items()))
    print(f"\n| bundle | clients | tokens/s | first token, ms: p50 / p99 | between tokens, ms |\n{'|---' * 5}|")
    found = {}
    for bundle in args.bundles:
        sizes = (args.requests, args.prompt, args.tokens, args.threads)
        found[bundle.name] = measure(bundle, args.clients, *sizes, args.peer is not None)
        if args.peer is not None:
            stop_ids = _stop_ids(bundle)
            found[bundle.name]["peer"] = measure_peer(args.peer, args.clients, sizes, stop_ids)
    if args.json is not None:
        args.json.write_text(json.dumps({"machine": machine(), "bundles": found}, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
