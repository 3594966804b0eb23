"""Bulk work beside the engine it runs on: `trivec embed` end to end, and the same texts without it.

Run: python -m benchmarks.bulk [--model ID|DIR] [--precision int8|fp32] [--texts N]

By turns in one process: a Parquet file to a Parquet file, the engine fed with the texts, and with
their token ids. A share is end to end over the engine, of texts a second; `cpu_share` counts the
seconds of this process's threads instead, which neighbours disturb less.
"""

import argparse
import asyncio
import tempfile
import time
from collections import defaultdict
from collections.abc import Awaitable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from benchmarks.figures import Provenance, Spread, ratio
from benchmarks.harness import EngineOnTrial, engine_on_trial, quiet_settings
from benchmarks.keeping import keep
from benchmarks.texts import sentences

from trivec.cli.embed import SHARD_CHARACTERS, SHARD_ROWS
from trivec.core.types import LongText, Output, Sequences
from trivec.jobs.corpus import Columns, Corpus, ShardSize, find_sources
from trivec.jobs.embedding import embed_corpus
from trivec.jobs.encoders import EmbedderEncoder
from trivec.jobs.results import RESERVED, Layout, Results
from trivec.server.machine import usable_cores

REQUESTS_AT_ONCE = 3
CUT = LongText.CUT_END


async def bulk(trial: EngineOnTrial, given: Path, out: Path) -> int:
    """Embed the file *given* into *out*: all that the command does but loading the model."""
    card = trial.embedder.card
    encoder = EmbedderEncoder(
        trial.embedder, Output.DENSE, model={"dimensions": card.dimensions}, truncate="none"
    )
    columns = Columns(id="id", reserved=RESERVED)
    corpus = Corpus(find_sources(str(given)), columns, ShardSize(SHARD_ROWS, SHARD_CHARACTERS))
    with Results(out, {}, Layout(Output.DENSE, card.dimensions)).open() as results:
        totals = await embed_corpus(
            corpus, results, encoder, stop=asyncio.Event(), on_progress=lambda _: None
        )
    assert totals is not None
    return totals.texts


async def engine(trial: EngineOnTrial, requests: Sequence[Sequence[str] | Sequences]) -> int:
    """Embed *requests*, of texts or of their ids, some of them at once."""
    waiting = iter(requests)

    async def client() -> None:
        for request in waiting:
            if isinstance(request, Sequences):
                ids = request
            else:
                ids = await trial.embedder.tokenizer.tokenize(request, long_text=CUT)
            await trial.embedder.embed(ids, Output.DENSE)

    await asyncio.gather(*(client() for _ in range(REQUESTS_AT_ONCE)))
    return sum(map(len, requests))


async def run(given: argparse.Namespace) -> dict[str, Any]:
    texts = sentences(given.texts)
    parts = [texts[at : at + SHARD_ROWS] for at in range(0, len(texts), SHARD_ROWS)]
    rates: dict[str, list[float]] = defaultdict(list)  # texts a second
    cpu_rates: dict[str, list[float]] = defaultdict(list)  # and a second of any core
    settings = quiet_settings(given.model, precision=given.precision, data_dir=given.data_dir)

    async def timed(name: str, work: Awaitable[int]) -> None:
        started_s, cpu_started_s = time.perf_counter(), time.process_time()
        count = await work
        rates[name].append(count / (time.perf_counter() - started_s))
        cpu_rates[name].append(count / (time.process_time() - cpu_started_s))

    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder, "in.parquet")
        pq.write_table(pa.table({"id": range(len(texts)), "text": texts}), corpus)
        async with engine_on_trial(settings, cores=usable_cores()) as trial:
            ids = [await trial.embedder.tokenizer.tokenize(p, long_text=CUT) for p in parts]
            await engine(trial, ids[:2])  # the first of its shape may compile
            for turn in range(given.repeats):
                await timed("ids", engine(trial, ids))
                await timed("bulk", bulk(trial, corpus, Path(folder, f"{turn}.parquet")))
                await timed("texts", engine(trial, parts))
            card = trial.embedder.card
    return {
        "benchmark": "bulk",
        "model": card.id,
        "precision": card.precision,
        "texts": len(texts),
        "texts_a_second": {name: asdict(Spread.of(many)) for name, many in rates.items()},
        **{
            f"{kind}_of_engine_on_{name}": asdict(ratio(of["bulk"], of[name]))
            for kind, of in (("share", rates), ("cpu_share", cpu_rates))
            for name in ("texts", "ids")
        },
        "provenance": Provenance.now("openvino", "pyarrow").as_dict(),
    }


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--model", default="all-minilm-l6-v2")
    arguments.add_argument("--precision", default="int8")
    arguments.add_argument("--data-dir", type=Path)
    arguments.add_argument("--texts", type=int, default=100_000)
    arguments.add_argument("--repeats", type=int, default=3)
    given = arguments.parse_args()
    keep(f"bulk-{given.model}-{given.precision}", asyncio.run(run(given)))


if __name__ == "__main__":
    main()
