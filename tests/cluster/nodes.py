"""A Ray cluster of this machine's: nodes are processes of it, and can be killed. No dashboard, no network."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
OBJECT_STORE_BYTES = 120 * 1024 * 1024
CPUS = 4  # that are said, not those of the machine


@contextmanager
def ray_nodes(*, cpus: int = CPUS) -> Iterator[Any]:
    """A `ray.cluster_utils.Cluster` with its first node alone; settings are the tests' own."""
    import ray
    from ray.cluster_utils import Cluster

    for name in [name for name in os.environ if name.startswith("TRIVEC_")]:
        del os.environ[name]
    os.environ |= {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_SERVE_LOG_TO_STDERR": "0",
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "trivec.cluster.proxy:middlewares",
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
        "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "60",
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]),
    }
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": cpus,
            "object_store_memory": OBJECT_STORE_BYTES,
            "include_dashboard": False,
        },
    )
    try:
        yield cluster
    finally:
        ray.shutdown()  # else a program that failed could not leave
        cluster.shutdown()


def add_node(cluster: Any, *, cpus: int = CPUS) -> Any:
    """One more node, once the cluster knows of it."""
    node = cluster.add_node(num_cpus=cpus, object_store_memory=OBJECT_STORE_BYTES)
    cluster.wait_for_nodes()
    return node


def process_ids(name: str, *, node: Any | None = None) -> list[int]:
    """Processes that hold an actor of class *name*; of *node* alone where one is given."""
    raylet = node.all_processes["raylet"][0].process.pid if node is not None else None
    found = []
    for folder in Path("/proc").iterdir():
        with suppress(OSError):
            if folder.name.isdigit() and f"ray::{name}" in (folder / "cmdline").read_text():
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                if raylet in (None, parent):
                    found.append(int(folder.name))
    return found


def wait_until(condition: Callable[[], bool], *, within_s: float, what: str) -> None:
    """Look again and again, since a cluster tells nobody."""
    until_s = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < until_s, f"{what} has not come within {within_s:g} s"
        time.sleep(0.02)
