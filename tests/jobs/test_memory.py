"""Memory is bounded by the shards in work, and does not grow with the corpus."""

import asyncio
import json
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from trivec.core.types import Output, Vectors
from trivec.jobs.corpus import Columns, Corpus, ShardSize, find_sources
from trivec.jobs.embedding import embed_corpus
from trivec.jobs.encoders import SHARDS_AT_ONCE, Encoded, ModelIdentity
from trivec.jobs.results import Layout, Results

DIMENSIONS = 256
SHARD_ROWS = 500


class Zeros:
    """An encoder that computes nothing."""

    shards_at_once = SHARDS_AT_ONCE

    @property
    def model(self) -> ModelIdentity:
        return {"dimensions": DIMENSIONS}

    async def encode(self, texts: Sequence[str]) -> Encoded:
        return Encoded(Vectors.of(np.zeros((len(texts), DIMENSIONS), np.float32)), len(texts))


class Slow(Zeros):
    """Lets a reader that nothing holds up go far ahead, and counts what is in work at once."""

    def __init__(self) -> None:
        self.at_once = self.at_once_max = 0
        self.full = asyncio.Event()

    async def encode(self, texts: Sequence[str]) -> Encoded:
        self.at_once += 1
        self.at_once_max = max(self.at_once, self.at_once_max)
        if self.at_once == SHARDS_AT_ONCE:
            self.full.set()
        await self.full.wait()  # nothing is done before as many as may be in work are
        for _ in range(20):  # to a thread and back, as reading a shard is
            await asyncio.to_thread(len, texts)
        self.at_once -= 1
        return await super().encode(texts)


def peak_bytes(folder: Path, row_count: int, encoder: Zeros) -> int:
    """The most bytes that Python and Arrow hold at a time for a corpus of *row_count*."""
    given, out = folder / f"{row_count}.jsonl", folder / f"{row_count}.npy"
    with given.open("w") as opened:
        opened.writelines(json.dumps({"text": f"{i} " + "x" * 50}) + "\n" for i in range(row_count))
    pool = pa.proxy_memory_pool(pa.default_memory_pool())
    before = pa.default_memory_pool()
    pa.set_memory_pool(pool)
    tracemalloc.start()
    try:
        with Results(out, {}, Layout(Output.DENSE, DIMENSIONS)).open() as results:
            corpus = Corpus(find_sources(str(given)), Columns(), ShardSize(SHARD_ROWS, 1 << 20))
            totals = asyncio.run(
                embed_corpus(
                    corpus, results, encoder, stop=asyncio.Event(), on_progress=lambda _: None
                )
            )
        assert totals is not None
        assert totals.texts == row_count
        return tracemalloc.get_traced_memory()[1] + int(pool.max_memory())
    finally:
        tracemalloc.stop()
        pa.set_memory_pool(before)


def test_ten_times_the_rows_take_the_same_memory(tmp_path: Path) -> None:
    shard_bytes = SHARD_ROWS * DIMENSIONS * 4
    few = peak_bytes(tmp_path, 2_000, Zeros())
    many = peak_bytes(tmp_path, 20_000, Zeros())
    assert many < few + (SHARDS_AT_ONCE + 2) * shard_bytes
    assert many < 20_000 * DIMENSIONS * 4, "less than the vectors alone"


def test_a_slow_model_holds_up_the_reader(tmp_path: Path) -> None:
    slow = Slow()
    peak_bytes(tmp_path, 15_000, slow)
    assert slow.at_once_max == SHARDS_AT_ONCE
