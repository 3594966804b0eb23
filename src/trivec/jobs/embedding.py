"""Embedding of a corpus: shards are read, encoded and kept, several at a time.

A shard that an earlier run has kept is read and compared, but not computed again.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from trivec.core.errors import JobFailed
from trivec.jobs.corpus import Corpus, Shard
from trivec.jobs.encoders import Encoded, TextEncoder
from trivec.jobs.results import Results, Totals


@dataclass(slots=True)
class Progress:
    """Progress of a run. Counts are of this run alone, without what earlier ones have kept."""

    rows_kept: int = 0  # by earlier runs
    rows: int = 0
    texts: int = 0
    tokens: int = 0
    bad: int = 0
    position: float | None = None  # share of the input that is done; None: unknown


async def embed_corpus(
    corpus: Corpus,
    results: Results,
    encoder: TextEncoder,
    *,
    stop: asyncio.Event,
    on_progress: Callable[[Progress], None],
) -> Totals | None:
    """Embed all of *corpus* into *results*; None where *stop* was set before its end.

    Shards that were begun are finished, then and when something cannot be read. *on_progress* is
    called after each, on the event loop. Raises `JobFailed`; what was kept by then stays.
    """
    if results.finished is not None:
        digests = (shard.digest for shard in corpus.shards())
        await asyncio.to_thread(results.check_unchanged, digests)
        return results.finished
    progress = Progress()
    places = asyncio.Semaphore(encoder.shards_at_once)

    def advance(shard: Shard) -> None:
        if shard.position is not None:
            progress.position = max(progress.position or 0.0, shard.position)
        on_progress(progress)

    async def run(shard: Shard) -> None:
        encoded = await encoder.encode(shard.texts) if shard.texts else Encoded(None, 0)
        await asyncio.to_thread(results.write, shard, encoded)
        progress.rows += shard.row_count
        progress.texts += len(shard.texts) - len(encoded.bad)
        progress.tokens += encoded.token_count
        progress.bad += len(shard.bad) + len(encoded.bad)
        advance(shard)
        places.release()

    shards = corpus.shards()
    shard_count: int | None = 0
    fault: JobFailed | None = None
    try:
        async with asyncio.TaskGroup() as group:
            while True:
                await places.acquire()
                if stop.is_set():
                    shard_count = None
                    break
                try:
                    shard = await asyncio.to_thread(next, shards, None)
                    if shard is None:
                        break
                    part = await asyncio.to_thread(results.part, shard)
                except JobFailed as found:
                    fault = found
                    break
                shard_count = shard.number + 1
                if part is None:
                    group.create_task(run(shard))
                else:
                    progress.rows_kept += part.row_count
                    advance(shard)
                    places.release()
    except ExceptionGroup as faults:
        raise faults.exceptions[0] from faults
    if fault is not None:
        raise fault
    if shard_count is None:
        return None
    return await asyncio.to_thread(results.assemble, shard_count)
