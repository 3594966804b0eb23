"""A Ray Data pipeline on two nodes, of which an actor and then a node are killed.

`python -m tests.soak.ray_dataset [--rows 200000] [--precision int8]`

Rows are counted as they leave the pipeline, which keeps no manifest: an actor is killed (`kill -9`)
after a fifth of them and the second node, with its actor, after half. Some texts come again and
again, so that a vector in the wrong row is found out.
"""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.texts import sentences
from tests.cluster.nodes import add_node, process_ids, ray_nodes
from tests.soak.report import Report, command

from trivec.cluster.data import embed_dataset

MODEL = "all-minilm-l6-v2"
DISTINCT = 4_000  # texts
COSINE_MIN = 0.99  # of int8, whose rows depend a little on the batch they are in
BLOCK_ROWS = 2_000
ACTOR = "MapWorker"


def with_texts(batch: dict[str, Any]) -> dict[str, Any]:
    texts = sentences(DISTINCT)
    return {"id": batch["id"], "text": [texts[i % DISTINCT] for i in batch["id"]]}


def pipeline(rows: int, settings: dict[str, str]) -> Any:
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    source = ray.data.range(rows, override_num_blocks=max(8, rows // BLOCK_ROWS))
    texts = source.map_batches(with_texts, batch_size=None)
    return embed_dataset(
        texts, model=MODEL, settings=settings, actors=2, scheduling_strategy="SPREAD"
    )


def resident_mib(pid: int) -> float:
    words = Path(f"/proc/{pid}/statm").read_text().split()
    return int(words[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


class Rows:
    """Rows that came out: how often each, and whether equal texts have equal vectors."""

    def __init__(self, rows: int) -> None:
        self.times = np.zeros(rows, np.int32)
        self.errors = 0
        self.cosine_min = 1.0
        self._first: dict[int, Any] = {}  # by text, its first vector

    def add(self, block: Any) -> None:
        ids = block["id"].to_numpy()
        np.add.at(self.times, ids, 1)
        self.errors += len(block) - block["error"].null_count
        vectors = np.stack(block["embedding"].to_numpy(zero_copy_only=False))
        for i, vector in zip((ids % DISTINCT).tolist(), vectors, strict=True):
            first = self._first.setdefault(i, vector)
            self.cosine_min = min(self.cosine_min, float(first @ vector))


def kills(cluster: Any, node: Any, rows: int, seen: Rows) -> Iterator[tuple[str, float]]:
    """What was killed, at which share of the rows; one step a call."""
    while seen.times.sum() < rows / 5:
        yield "", 0.0
    victim = process_ids(ACTOR)[0]
    os.kill(victim, signal.SIGKILL)
    yield "actor", seen.times.sum() / rows
    while seen.times.sum() < rows / 2:
        yield "", 0.0
    on_node = process_ids(ACTOR, node=node)
    cluster.remove_node(node, allow_graceful=False)
    yield f"node with {len(on_node)} actors", seen.times.sum() / rows
    while True:
        yield "", 0.0


def run(rows: int, precision: str, backend: str) -> Report:
    import ray

    settings = {"precision": precision, "backend": backend}
    if backend == "fake":
        del settings["precision"]
    seen, peak, killed = Rows(rows), dict[str, float](), dict[str, float]()
    with ray_nodes() as cluster:
        node = add_node(cluster)
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        started_s = time.perf_counter()
        step = kills(cluster, node, rows, seen)
        batches = pipeline(rows, settings).iter_batches(batch_size=None, batch_format="pyarrow")
        for block in batches:
            seen.add(block)
            what, share = next(step)
            if what:
                killed[what] = round(float(share), 3)
            for name, pids in (("actor", process_ids(ACTOR)), ("driver", [os.getpid()])):
                for pid in pids:
                    peak[name] = max(peak.get(name, 0.0), resident_mib(pid))
        took_s = time.perf_counter() - started_s
        ray.shutdown()
    report = Report()
    report.at_most("rows that are missing", int((seen.times == 0).sum()), 0)
    report.at_most("rows that came twice", int((seen.times > 1).sum()), 0)
    report.at_most("rows without a vector", seen.errors, 0)
    report.at_least("cosine of equal texts", seen.cosine_min, COSINE_MIN)
    report.at_least("actors and nodes killed", len(killed), 2)
    report.figures = {
        "killed_at": killed,
        "seconds": round(took_s, 1),
        "texts_a_second": round(rows / took_s),
        "peak_mib": {name: round(mib) for name, mib in peak.items()},
    }
    return report


if __name__ == "__main__":
    command("ray-dataset", __doc__, run, rows=200_000, precision="int8", backend="openvino")
