"""A Ray cluster of this machine's: nodes are processes of it, and can be killed. No dashboard, no network."""

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
OBJECT_STORE_BYTES = 120 * 1024 * 1024
CPUS = 4  # that are said, not those of the machine

# They run where Ray is: make test-cluster.
collect_ignore_glob = [] if importlib.util.find_spec("ray") else ["*.py"]


@pytest.fixture(scope="session")
def cluster() -> Iterator[Any]:
    """A `ray.cluster_utils.Cluster` with its first node alone."""
    from ray.cluster_utils import Cluster

    for name in [name for name in os.environ if name.startswith("TRIVEC_")]:
        del os.environ[name]
    os.environ |= {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_SERVE_LOG_TO_STDERR": "0",
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
        "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "60",
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]),
    }
    made = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": CPUS,
            "object_store_memory": OBJECT_STORE_BYTES,
            "include_dashboard": False,
        },
    )
    yield made
    made.shutdown()


@pytest.fixture
def second_node(cluster: Any) -> Iterator[Any]:
    """A node beside the first one, for a test that may kill it."""
    node = cluster.add_node(num_cpus=CPUS, object_store_memory=OBJECT_STORE_BYTES)
    cluster.wait_for_nodes()
    yield node
    if node in cluster.list_all_nodes():
        cluster.remove_node(node)


@pytest.fixture
def driver(cluster: Any) -> Iterator[None]:
    """The tests' process becomes a program of the cluster."""
    import ray

    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()
