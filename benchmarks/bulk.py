"""Bulk work beside the engine it runs on: `trivec embed` end to end, and the same texts without it.

Run: python -m benchmarks.bulk [--model ID|DIR] [--precision int8|fp32] [--texts N]

By turns in one process: a Parquet file to a Parquet file, the engine fed with the texts, and with
their token ids. A share is end to end over the engine; one model, short texts that all differ.
"""

import argparse
import asyncio
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
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


async def bulk_rate(trial: EngineOnTrial, given: Path, out: Path) -> float:
    """Texts a second of the file *given*, everything counted but loading the model."""
    card = trial.embedder.card
    columns = Columns(id="id", reserved=RESERVED)
    started_s = time.perf_counter()
    encoder = EmbedderEncoder(
        trial.embedder, Output.DENSE, model={"dimensions": card.dimensions}, truncate="none"
    )
    corpus = Corpus(find_sources(str(given)), columns, ShardSize(SHARD_ROWS, SHARD_CHARACTERS))
    with Results(out, {}, Layout(Output.DENSE, card.dimensions)).open() as results:
        totals = await embed_corpus(
            corpus, results, encoder, stop=asyncio.Event(), on_progress=lambda _: None
        )
    assert totals is not None
    return totals.texts / (time.perf_counter() - started_s)


async def engine_rate(trial: EngineOnTrial, requests: Sequence[Sequence[str] | Sequences]) -> float:
    """Texts a second of *requests*, of texts or of their ids, some of them at once."""
    waiting = iter(requests)

    async def client() -> None:
        for request in waiting:
            if isinstance(request, Sequences):
                ids = request
            else:
                ids = await trial.embedder.tokenize(request, long_text=CUT)
            await trial.embedder.embed(ids, Output.DENSE)

    started_s = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(REQUESTS_AT_ONCE)))
    return sum(map(len, requests)) / (time.perf_counter() - started_s)


async def run(given: argparse.Namespace) -> dict[str, Any]:
    texts = sentences(given.texts)
    parts = [texts[at : at + SHARD_ROWS] for at in range(0, len(texts), SHARD_ROWS)]
    rates: dict[str, list[float]] = defaultdict(list)
    settings = quiet_settings(given.model, precision=given.precision, data_dir=given.data_dir)
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder, "in.parquet")
        pq.write_table(pa.table({"id": range(len(texts)), "text": texts}), corpus)
        async with engine_on_trial(settings, cores=usable_cores()) as trial:
            ids = [await trial.embedder.tokenize(p, long_text=CUT) for p in parts]
            for turn in range(given.repeats):
                rates["ids"].append(await engine_rate(trial, ids))
                rates["bulk"].append(
                    await bulk_rate(trial, corpus, Path(folder, f"{turn}.parquet"))
                )
                rates["texts"].append(await engine_rate(trial, parts))
            card = trial.embedder.card
    return {
        "benchmark": "bulk",
        "model": card.id,
        "precision": card.precision,
        "texts": len(texts),
        "texts_a_second": {name: asdict(Spread.of(many)) for name, many in rates.items()},
        "share_of_engine_on_texts": asdict(ratio(rates["bulk"], rates["texts"])),
        "share_of_engine_on_ids": asdict(ratio(rates["bulk"], rates["ids"])),
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
