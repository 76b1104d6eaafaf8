"""What Ray Serve costs a request: the same ones of ``melt serve``, and of a replica behind ingress and proxy.

    build/environments/ray/bin/python integrations/ray/benchmarks/passing_on.py build/melt-tiny

One client, one request after another, the servers in turns: an answer of 3 tokens whole, and a stream of 200 tokens.
"""

import argparse
import http.client
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from local import deploy, local_ray

from melt_runtime.bench.measure import machine

TEXTS = "/v1/completions"
HEADERS = {"Content-Type": "application/json"}
TOKENS = 200


@contextmanager
def served(bundle: Path, slots: int) -> Iterator[int]:
    """The port of a ``melt serve`` of its own."""
    command = [sys.executable, "-m", "melt_runtime", "serve", str(bundle), "--port", "0", "--device", "cpu"]
    server = subprocess.Popen([*command, "--slots", str(slots), "--threads", "1"], stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    try:
        for line in server.stderr:
            if line.startswith("listening on "):
                yield int(line.rsplit(":", 1)[1])
                break
    finally:
        server.terminate()
        server.wait()


def seconds_of(port: int, body: dict[str, Any]) -> tuple[float, float]:
    """To the first bytes of an answer's body, and to its end."""
    with closing(http.client.HTTPConnection("127.0.0.1", port)) as connection:
        began = time.perf_counter()
        connection.request("POST", TEXTS, json.dumps(body), HEADERS)
        response = connection.getresponse()
        assert response.status == 200, response.read()
        response.readline()
        first = time.perf_counter() - began
        response.read()
        return first, time.perf_counter() - began


def measure(ports: list[int], requests: int) -> list[list[float]]:
    """Medians of each server, in seconds: a short answer; a stream's first event; its end. The servers take turns."""
    short = {"prompt": [5, 6, 7], "max_tokens": 3, "logit_bias": {"3": -100}, "loops": 4}
    long = {**short, "max_tokens": TOKENS, "stream": True}
    found: list[list[tuple[float, ...]]] = [[] for _ in ports]
    for _ in range(requests + 1):
        for port, rows in zip(ports, found, strict=True):
            rows.append((seconds_of(port, short)[1], *seconds_of(port, long)))
    return [[statistics.median(column) for column in zip(*rows[1:], strict=True)] for rows in found]


def main() -> int:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, metavar="BUNDLE")
    parser.add_argument("--requests", type=int, default=40, help="default: %(default)s")
    parser.add_argument("--slots", type=int, default=4, help="default: %(default)s")
    args = parser.parse_args()
    print("; ".join(f"{name} {value}" for name, value in machine().items()))
    print(f"\n| server | answer of 3 tokens, ms | stream: first event, ms | {TOKENS} tokens, ms |\n{'|---' * 4}|")
    with served(args.bundle, args.slots) as alone, local_ray(2) as port:
        deploy(bundle=args.bundle.resolve(), slots=args.slots, device="cpu")
        for server, seconds in zip(("melt serve", "Ray Serve"), measure([alone, port], args.requests), strict=True):
            print(f"| {server} | {' | '.join(f'{1e3 * value:.1f}' for value in seconds)} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
