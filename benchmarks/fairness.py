"""A lone client's latency while one huge request runs, against what it has alone.

Run: python -m benchmarks.fairness [--model ID|DIR] [--name NAME] [--texts 2048] [--tokens 128]

The target: the p99 beside the huge request is at most the p99 alone plus 1.5 times one batch, where a
batch is 512 tokens on one stream, measured in this run; and the huge request loses at most a tenth of
its rate. Batches are timed one on each stream at once, since free streams would share a single one.
It runs on the engine's own door, so that HTTP adds nothing. The last line is JSON.
"""

import asyncio
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.figures import Provenance, Spread, keep, parser, percentile
from benchmarks.harness import EngineOnTrial, engine_on_trial, quiet_settings
from benchmarks.texts import Workload

from trivec.core.types import Output, Sequences
from trivec.server.machine import usable_cores

BATCH_TOKENS = 512
QUERY_TOKENS = 16
BETWEEN_QUERIES_S = 0.02  # a person asks and reads; a client without pause would be another load


async def timed(trial: EngineOnTrial, sequences: Sequences) -> float:
    started_s = time.perf_counter()
    await trial.embedder.embed(sequences, Output.DENSE)
    return time.perf_counter() - started_s


async def queries(trial: EngineOnTrial, query: Sequences, stop: asyncio.Event) -> list[float]:
    """Seconds of each query, one after another until *stop*."""
    latencies = []
    while not stop.is_set():
        latencies.append(await timed(trial, query))
        await asyncio.sleep(BETWEEN_QUERIES_S)
    return latencies


async def queries_for(trial: EngineOnTrial, query: Sequences, seconds: float) -> list[float]:
    stop = asyncio.Event()
    asyncio.get_running_loop().call_later(seconds, stop.set)
    return await queries(trial, query, stop)


async def measure(trial: EngineOnTrial, given: Any, *, streams: int) -> dict[str, Any]:
    vocabulary_size = trial.embedder.card.vocabulary_size
    tokens = min(given.tokens, trial.embedder.card.token_count_max)
    query = Workload("query", (QUERY_TOKENS,)).sequences(vocabulary_size=vocabulary_size)
    huge = Workload("huge", (tokens,) * given.texts).sequences(vocabulary_size=vocabulary_size)
    one_each = Workload("batches", (tokens,) * (BATCH_TOKENS // tokens * streams))
    batch_each = one_each.sequences(vocabulary_size=vocabulary_size)

    await timed(trial, batch_each)
    batches = [await timed(trial, batch_each) for _ in range(9)]
    alone = await queries_for(trial, query, given.seconds)
    huge_alone_s = await timed(trial, huge)
    finished = asyncio.Event()
    asking = asyncio.create_task(queries(trial, query, finished))
    huge_beside_s = await timed(trial, huge)
    finished.set()
    beside = await asking

    batch_s = Spread.of(batches).median
    allowed_s = percentile(alone, 0.99) + 1.5 * batch_s
    return {
        "batch_ms": batch_s * 1e3,
        "queries_alone": len(alone),
        "queries_beside": len(beside),
        "p99_alone_ms": percentile(alone, 0.99) * 1e3,
        "p50_beside_ms": percentile(beside, 0.50) * 1e3,
        "p99_beside_ms": percentile(beside, 0.99) * 1e3,
        "p99_allowed_ms": allowed_s * 1e3,
        "batches_waited_p99": (percentile(beside, 0.99) - percentile(alone, 0.99)) / batch_s,
        "fair": percentile(beside, 0.99) <= allowed_s,
        "huge_rate_kept": huge_alone_s / huge_beside_s,
    }


async def run(given: Any) -> dict[str, Any]:
    settings = quiet_settings(given.model, precision=given.precision, data_dir=given.data_dir)
    cores = usable_cores()
    async with engine_on_trial(settings, cores=cores) as trial:
        figures = await measure(trial, given, streams=cores)
    print(
        f"p99 {figures['p99_beside_ms']:.1f} ms beside the huge request, "
        f"{figures['p99_allowed_ms']:.1f} ms allowed; the huge one kept "
        f"{figures['huge_rate_kept']:.2f} of its rate",
        file=sys.stderr,
    )
    return {
        "benchmark": "fairness",
        "model": given.name,
        "precision": given.precision,
        "figures": figures,
        "provenance": Provenance.now("openvino").as_dict(),
    }


def main() -> None:
    arguments = parser(
        __doc__, model="all-minilm-l6-v2", name="all-minilm-l6-v2", precision="int8", texts=2048,
        tokens=128, seconds=5.0,
    )  # fmt: skip
    arguments.add_argument("--data-dir", type=Path)
    given = arguments.parse_args()
    name = f"fairness-{given.name}-{given.precision}"
    keep(name, asyncio.run(run(given)), record=given.record)


if __name__ == "__main__":
    main()
