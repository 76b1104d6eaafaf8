"""A cluster of several nodes on this machine, one for each file of tests."""

import os

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_AUTH_MODE"] = "disabled"  # else Ray writes a key into the home folder
os.environ.setdefault("OMP_NUM_THREADS", "1")

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

import melt_runtime

BUNDLE = Path(melt_runtime.__file__).parent / "demo" / "melt-tiny"
STORE = 80 << 20
"""Bytes of a node's object store."""


@pytest.fixture(scope="session")
def bundle() -> Path:
    """The model that ships in the runtime."""
    return BUNDLE


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head with one CPU, without a dashboard; tests add nodes."""
    head = {"num_cpus": 1, "resources": {"head": 1}, "object_store_memory": STORE, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
    yield cluster
    ray.shutdown()
    cluster.shutdown()
