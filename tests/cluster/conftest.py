"""One Ray cluster for the tests of this folder, which run where Ray is: make test-cluster."""

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
from tests.cluster.nodes import add_node, ray_nodes

collect_ignore_glob = [] if importlib.util.find_spec("ray") else ["*.py"]


@pytest.fixture(scope="session")
def cluster() -> Iterator[Any]:
    """A `ray.cluster_utils.Cluster` with its first node alone."""
    with ray_nodes() as made:
        yield made


@pytest.fixture
def second_node(cluster: Any) -> Iterator[Any]:
    """A node beside the first one, for a test that may kill it."""
    node = add_node(cluster)
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
