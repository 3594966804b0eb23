"""A lone client's latency while one huge request runs, against what it has alone.

Run: python -m tests.soak.fairness [--model ID|DIR] [--precision int8] [--texts 2048] [--tokens 128]

The p99 beside the huge request is at most the p99 alone plus 1.5 times one batch, where a batch is
512 tokens on one stream, measured in this run; and the huge request loses at most a tenth of its
rate. Batches are timed one on each stream at once, since free streams would share a single one.
It runs on the engine's own port, so that HTTP adds nothing.
"""

import asyncio
import time
from typing import Any

from benchmarks.figures import Spread, percentile
from benchmarks.harness import EngineOnTrial, engine_on_trial, quiet_settings
from benchmarks.texts import Workload
from tests.soak.report import Report, command

from trivec.core.types import Output, Sequences
from trivec.server.machine import usable_cores

BATCH_TOKENS = 512
QUERY_TOKENS = 16
BETWEEN_QUERIES_S = 0.02  # a person asks and reads; a client without pause would be another load
BATCHES_WAITED_MAX = 1.5
RATE_KEPT_MIN = 0.9


async def timed(trial: EngineOnTrial, sequences: Sequences) -> float:
    started_s = time.perf_counter()
    await trial.embedder.embed(sequences, Output.DENSE)
    return time.perf_counter() - started_s


async def queries(
    trial: EngineOnTrial, query: Sequences, until: "asyncio.Future[Any]"
) -> list[float]:
    """Seconds of each query, one after another until *until* is done."""
    latencies = []
    while not until.done():
        latencies.append(await timed(trial, query))
        await asyncio.sleep(BETWEEN_QUERIES_S)
    return latencies


async def measure(
    trial: EngineOnTrial, report: Report, *, texts: int, tokens: int, seconds: float, streams: int
) -> None:
    vocabulary_size = trial.embedder.card.vocabulary_size
    tokens = min(tokens, trial.embedder.card.token_count_max)

    def sequences(*lengths: int) -> Sequences:
        return Workload("", lengths).sequences(vocabulary_size=vocabulary_size)

    query, huge = sequences(QUERY_TOKENS), sequences(*[tokens] * texts)
    batch_each = sequences(*[tokens] * (BATCH_TOKENS // tokens * streams))
    await timed(trial, batch_each)
    batch_s = Spread.of([await timed(trial, batch_each) for _ in range(9)]).median
    alone = await queries(trial, query, asyncio.ensure_future(asyncio.sleep(seconds)))
    huge_alone_s = await timed(trial, huge)
    huge_beside = asyncio.ensure_future(timed(trial, huge))
    beside = await queries(trial, query, huge_beside)

    waited = (percentile(beside, 0.99) - percentile(alone, 0.99)) / batch_s
    report.at_most("p99 of a query beside, in batches over alone", waited, BATCHES_WAITED_MAX)
    kept = huge_alone_s / huge_beside.result()
    report.at_least("seconds of the huge request alone, of those beside", kept, RATE_KEPT_MIN)
    report.figures |= {
        "batch_ms": batch_s * 1e3,
        "p99_alone_ms": percentile(alone, 0.99) * 1e3,
        "p50_beside_ms": percentile(beside, 0.50) * 1e3,
        "p99_beside_ms": percentile(beside, 0.99) * 1e3,
    }


def run(*, model: str, precision: str, texts: int, tokens: int, seconds: float) -> Report:
    report, settings = Report(), quiet_settings(model, precision=precision)

    async def on_trial() -> None:
        cores = usable_cores()
        async with engine_on_trial(settings, cores=cores) as trial:
            await measure(trial, report, texts=texts, tokens=tokens, seconds=seconds, streams=cores)

    asyncio.run(on_trial())
    return report


if __name__ == "__main__":
    command(
        "fairness", __doc__, run, model="all-minilm-l6-v2", precision="int8", texts=2048,
        tokens=128, seconds=5.0,
    )  # fmt: skip
