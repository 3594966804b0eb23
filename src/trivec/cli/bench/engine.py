"""The rate of the engine alone: no HTTP, no keys, the same line, workers and backend as in service.

It takes the parts from `assemble` and knows only the Embedder they give.
"""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from trivec.build import Models, load_models, open_server_parts
from trivec.cli.bench.texts import Workload
from trivec.core.ports import Embedder
from trivec.core.types import LongText, Output, Sequences
from trivec.settings import Settings, load_settings

WAIT_S_MAX = 3600.0  # a measurement brings more work than a server would admit
REQUESTS_AT_ONCE = 4  # enough that a freed worker always finds the next batch waiting


@dataclass(frozen=True, slots=True)
class EngineRate:
    """One measurement."""

    texts: int
    tokens: int
    elapsed_s: float

    @property
    def tokens_a_second(self) -> float:
        return self.tokens / self.elapsed_s

    @property
    def texts_a_second(self) -> float:
        return self.texts / self.elapsed_s


@dataclass(frozen=True, slots=True)
class EngineOnTrial:
    """A loaded model with its workers running. Methods are called on the event loop."""

    embedder: Embedder
    models: Models
    load_s: float

    async def rate_of(self, workload: Workload) -> EngineRate:
        """Embed *workload*, dealt out over several requests, and time it."""
        whole = workload.sequences(vocabulary_size=self.embedder.card.vocabulary_size)
        requests = deal(whole, REQUESTS_AT_ONCE)
        started_s = time.perf_counter()
        await asyncio.gather(*(self.embedder.embed(one, Output.DENSE) for one in requests))
        return EngineRate(len(whole), whole.token_count, time.perf_counter() - started_s)

    async def rate_of_texts(self, texts: Sequence[str]) -> EngineRate:
        """Tokenise and embed *texts* likewise; too long ones are cut."""
        started_s = time.perf_counter()
        counts = await asyncio.gather(
            *(self._embed_texts(texts[i::REQUESTS_AT_ONCE]) for i in range(REQUESTS_AT_ONCE))
        )
        return EngineRate(len(texts), sum(counts), time.perf_counter() - started_s)

    async def _embed_texts(self, texts: Sequence[str]) -> int:
        if not texts:
            return 0
        sequences = await self.embedder.tokenize(texts, long_text=LongText.CUT_END)
        await self.embedder.embed(sequences, Output.DENSE)
        return sequences.token_count


def deal(whole: Sequences, hands: int) -> list[Sequences]:
    """*whole* as up to *hands* requests, sequences dealt in turn so that each has every length."""
    ids = [
        whole.token_ids[start:end]
        for start, end in zip(whole.cu_seqlens[:-1], whole.cu_seqlens[1:], strict=True)
    ]
    return [Sequences.pack(ids[hand::hands]) for hand in range(min(hands, len(ids)))]


def quiet_settings(model: str, *, precision: str, data_dir: Path | None = None) -> Settings:
    """Settings that serve *model* to nobody and refuse no load. Raises `SettingInvalid`."""
    flags = {
        "models": (model,),
        "precision": precision,
        "data_dir": data_dir,
        "no_auth": True,
        "log_level": "warning",
        "line": {"wait_s_max": WAIT_S_MAX, "first_batch_s_max": WAIT_S_MAX},
    }
    return load_settings(flags, os.environ)


@asynccontextmanager
async def engine_on_trial(settings: Settings, *, cores: int) -> AsyncIterator[EngineOnTrial]:
    """Load the first model of *settings* and run its workers meanwhile. Raises `StartError`."""
    front = open_server_parts(settings)
    front.accounts.start()
    started_s = time.perf_counter()
    models = load_models(settings, front, cores=cores)
    models.workers.start()
    try:
        yield EngineOnTrial(
            embedder=models.embedders[models.loaded[0].card.id],
            models=models,
            load_s=time.perf_counter() - started_s,
        )
    finally:
        await models.workers.stop(within_s=30.0)  # closes the backends, too
        front.close()


async def sized(trial: EngineOnTrial, workload: Workload, *, seconds: float) -> Workload:
    """*workload* repeated or cut so that it runs for about *seconds*, at least a text a slot."""
    rate = await trial.rate_of(workload)
    wanted = rate.tokens_a_second * seconds
    few = max(1, trial.models.slot_count)
    if wanted < workload.token_count:
        kept = max(few, int(len(workload.lengths) * wanted / workload.token_count))
        return Workload(workload.name, workload.lengths[:kept])
    times = max(1, round(wanted / workload.token_count))
    return Workload(workload.name, workload.lengths * times)
