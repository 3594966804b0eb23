"""A Ray Data pipeline on two nodes, of which an actor and then a node are killed.

`python -m tests.soak.ray_dataset [--rows 200000] [--precision int8]`

Rows are counted as they leave the pipeline, which keeps no manifest: an actor is killed (`kill -9`)
after a fifth of them and the second node, with its actor, after half. Some texts come again and
again, so that a vector in the wrong row is found out.
"""

import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.texts import sentences
from tests.cluster.nodes import add_node, process_ids, ray_nodes
from tests.soak.report import Report, command

from trivec.cluster.data import embed_dataset

MODEL = "all-minilm-l6-v2"
DISTINCT = 4_000  # texts
COSINE_MIN = 0.9999  # of equal texts: a vector does not depend on its batch
BLOCK_ROWS = 2_000
ACTOR_AFTER, NODE_AFTER = 0.2, 0.5  # of the rows
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
    """Zero of a process that has just ended."""
    with suppress(OSError):
        words = Path(f"/proc/{pid}/statm").read_text().split()
        return int(words[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    return 0.0


class Rows:
    """Rows that came out: how often each, whether equal texts have equal vectors, what died meanwhile."""

    def __init__(self, rows: int) -> None:
        self.times = np.zeros(rows, np.int32)
        self.errors = 0
        self.cosine_min = 1.0
        self.killed: dict[str, float] = {}  # after which share of the rows
        self.peak_mib: dict[str, float] = {}
        self._first: dict[int, Any] = {}  # by text, its first vector

    @property
    def share(self) -> float:
        return float(self.times.sum() / len(self.times))

    def add(self, block: Any) -> None:
        ids = block["id"].to_numpy()
        np.add.at(self.times, ids, 1)
        self.errors += len(block) - block["error"].null_count
        vectors = np.stack(block["embedding"].to_numpy(zero_copy_only=False))
        for i, vector in zip((ids % DISTINCT).tolist(), vectors, strict=True):
            first = self._first.setdefault(i, vector)
            norms = float(np.linalg.norm(first) * np.linalg.norm(vector))
            self.cosine_min = min(self.cosine_min, float(first @ vector) / norms)
        for name, ids_of in (("actor", process_ids(ACTOR)), ("driver", [os.getpid()])):
            found = max(map(resident_mib, ids_of), default=0.0)
            self.peak_mib[name] = max(found, self.peak_mib.get(name, 0.0))


def outlive(cluster: Any, node: Any, rows: int, settings: dict[str, str]) -> Rows:
    """What comes out of the pipeline while an actor is killed, and *node* of *cluster* with its own."""
    seen = Rows(rows)
    for block in pipeline(rows, settings).iter_batches(batch_size=None, batch_format="pyarrow"):
        seen.add(block)
        if not seen.killed and seen.share >= ACTOR_AFTER:
            os.kill(process_ids(ACTOR)[0], signal.SIGKILL)
            seen.killed["an actor"] = round(seen.share, 3)
        elif len(seen.killed) == 1 and seen.share >= NODE_AFTER:
            actors = len(process_ids(ACTOR, node=node))
            cluster.remove_node(node, allow_graceful=False)
            seen.killed[f"a node with {actors} of the actors"] = round(seen.share, 3)
    return seen


def run(rows: int, precision: str, backend: str) -> Report:
    import ray

    settings = {"backend": backend} | ({} if backend == "fake" else {"precision": precision})
    with ray_nodes() as cluster:
        node = add_node(cluster)
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        started_s = time.perf_counter()
        seen = outlive(cluster, node, rows, settings)
        took_s = time.perf_counter() - started_s
    report = Report()
    report.at_most("rows that are missing", int((seen.times == 0).sum()), 0)
    report.at_most("rows that came twice", int((seen.times > 1).sum()), 0)
    report.at_most("rows without a vector", seen.errors, 0)
    report.at_least("cosine of equal texts", seen.cosine_min, COSINE_MIN)
    report.at_least("actors and nodes killed", len(seen.killed), 2)
    report.figures = {
        "killed_at": seen.killed,
        "seconds": round(took_s, 1),
        "texts_a_second": round(rows / took_s),
        "peak_mib": {name: round(mib) for name, mib in seen.peak_mib.items()},
    }
    return report


if __name__ == "__main__":
    command("ray-dataset", __doc__, run, rows=200_000, precision="int8", backend="openvino")
