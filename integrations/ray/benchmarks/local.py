"""Ray and a deployment for measurements: on this machine alone, or on the cluster of RAY_ADDRESS."""

import json
import logging
import os
import socket
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray import serve

from melt_ray.serve import ServeArgs, build


@contextmanager
def local_ray(cpus: int) -> Iterator[int]:
    """A cluster of one node, with so many CPUs by name, or that of RAY_ADDRESS; gives the port of its HTTP proxy."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    local = {"num_cpus": cpus, "include_dashboard": False, "object_store_memory": 100 << 20}
    ray.init(log_to_driver=False, logging_level=logging.ERROR, **({} if "RAY_ADDRESS" in os.environ else local))
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port}, logging_config={"log_level": "WARNING"})
        yield port
        serve.shutdown()
    finally:
        ray.shutdown()


def deploy(**args: Any) -> None:
    """Replaces what is deployed; everybody on this machine may ask."""
    serve.run(build(ServeArgs(no_key=True, ingress_cpus=0, **args)))


def ask(port: int, path: str, body: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The name of the replica that answered, and its answer."""
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=600) as response:
        return response.headers["x-melt-replica"], json.loads(response.read())
