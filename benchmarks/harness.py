"""What is measured: an engine in this process, or a server over HTTP, and how it is loaded.

`EngineOnTrial` is the same queue, workers and backend as in service, without HTTP and keys.
"""

import asyncio
import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from types import MappingProxyType
from urllib.request import urlopen

import numpy as np
from benchmarks.figures import Spread, percentile
from benchmarks.load import Answers, Load, run_load
from benchmarks.texts import Workload

from trivec.build import Models, load_models, open_server_parts
from trivec.core.errors import StartError
from trivec.core.ports import Embedder
from trivec.core.types import LongText, Output, Sequences
from trivec.settings import Settings, load_settings

WAIT_S_MAX = 3600.0  # a measurement brings more work than a server would admit
REQUESTS_AT_ONCE = 4  # enough that a freed worker always finds the next batch waiting
START_S_MAX = 300.0  # a large model's first start hashes, converts and certifies it
POLL_S = 0.05


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
        sequences = await self.embedder.tokenizer.tokenize(texts, long_text=LongText.CUT_END)
        await self.embedder.embed(sequences, Output.DENSE)
        return sequences.token_count


def deal(whole: Sequences, hands: int) -> list[Sequences]:
    """*whole* as up to *hands* requests, sequences dealt in turn so that each has every length."""
    ids = np.split(whole.token_ids, whole.cu_seqlens[1:-1])
    return [Sequences.pack(ids[hand::hands]) for hand in range(min(hands, len(ids)))]


def quiet_settings(model: str, *, precision: str, data_dir: Path | None = None) -> Settings:
    """Settings that serve *model* to nobody and refuse no load. Raises `SettingInvalid`."""
    flags = {
        "models": (model,),
        "precision": precision,
        "data_dir": data_dir,
        "no_auth": True,
        "log_level": "warning",
        "queue": {"wait_s_max": WAIT_S_MAX, "first_batch_s_max": WAIT_S_MAX},
    }
    return load_settings(flags, os.environ)


@asynccontextmanager
async def engine_on_trial(settings: Settings, *, cores: int) -> AsyncIterator[EngineOnTrial]:
    """Load the first model of *settings* and run its workers meanwhile. Raises `StartError`."""
    parts = open_server_parts(settings)
    parts.accounts.start()
    started_s = time.perf_counter()
    models = load_models(settings, parts, cores=cores)
    models.workers.start()
    try:
        embedder = models.embedders[models.loaded[0].card.id]
        yield EngineOnTrial(embedder, models, load_s=time.perf_counter() - started_s)
    finally:
        await models.workers.stop(within_s=30.0)  # closes the backends, too
        parts.close()


async def sized(trial: EngineOnTrial, workload: Workload, *, seconds: float) -> Workload:
    """*workload* repeated or cut so that it runs for about *seconds*, at least a text a slot."""
    rate = await trial.rate_of(workload)
    wanted = rate.tokens_a_second * seconds
    few = max(1, trial.models.slot_count)
    if wanted < workload.token_count:
        kept = max(few, int(len(workload.lengths) * wanted / workload.token_count))
        return Workload(workload.name, workload.lengths[:kept])
    return Workload(workload.name, workload.lengths * max(1, round(wanted / workload.token_count)))


class ServerFailed(StartError):
    """The server did not become ready, or does not answer as one of ours does."""


@dataclass(frozen=True, slots=True)
class Target:
    """Where a load goes."""

    base_url: str  # with the prefix, as http://127.0.0.1:8000/v1
    model: str
    key: str | None
    pid: int | None = None  # of a server of our own


@dataclass(frozen=True, slots=True)
class Shape:
    """How many clients ask at once, with how many texts each."""

    client_count: int
    text_count: int

    def __str__(self) -> str:
        return f"{self.client_count}x{self.text_count}"


SHAPES = (Shape(1, 1), Shape(16, 1), Shape(8, 8), Shape(4, 64))


def measure(target: Target, shape: Shape, texts: Sequence[str], *, duration_s: float) -> Answers:
    """Load *target* with requests of *shape* over *texts*. Raises `LoadFailed`."""
    asked = {"model": target.model, "encoding_format": "base64"}
    parts = in_parts(texts, shape.text_count)
    bodies = [json.dumps({**asked, "input": list(part)}).encode() for part in parts]
    url = f"{target.base_url}/embeddings"
    return run_load(Load(url, bodies, shape.client_count, duration_s, target.key))


def in_parts(texts: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    """Consecutive parts of exactly *size*; what is left over is dropped."""
    for at in range(0, len(texts) - size + 1, size):
        yield texts[at : at + size]


@contextmanager
def own_server(
    model: str,
    *,
    data_dir: Path | None = None,
    arguments: Sequence[str] = (),
    environ: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[Target]:
    """`trivec serve` on a free port until the block ends; without *data_dir*, with a fresh store.

    Its log is kept out of the way and quoted when it does not start: `ServerFailed`.
    """
    name = model.partition("=")[0]
    if Path(model).is_dir():
        name, model = "bench", f"bench={model}"
    key = secrets.token_urlsafe(24)
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="trivec-bench-") as folder:
        log = Path(folder) / "log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                [
                    sys.executable, "-m", "trivec", "serve", "--model", model,
                    "--port", str(port), "--data-dir", str(data_dir or folder), *arguments,
                ],
                env={**os.environ, **environ, "TRIVEC_API_KEY": key}, stdout=out, stderr=out,
            )  # fmt: skip
        try:
            base = f"http://127.0.0.1:{port}"
            wait_until_ready(base, process, log)
            yield Target(f"{base}/v1", name, key, process.pid)
        finally:
            process.terminate()
            process.wait(60)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def wait_until_ready(
    base_url: str, process: "subprocess.Popen[bytes]", log: Path, *, path: str = "/readyz"
) -> float:
    """Seconds until *path* answers 200. Raises `ServerFailed` with the end of *log*."""
    started_s = time.perf_counter()
    while time.perf_counter() - started_s < START_S_MAX and process.poll() is None:
        try:
            with urlopen(f"{base_url}{path}", timeout=10):
                return time.perf_counter() - started_s
        except (OSError, HTTPException):  # an answer of another status among them
            pass
        time.sleep(POLL_S)
    said = log.read_text(errors="replace")[-2000:]
    raise ServerFailed(f"the server was not ready (exit code {process.poll()}):\n{said}")


def latency_figures(many: Sequence[Answers], text_count: int) -> dict[str, Spread]:
    """Rates and latencies of repeated *many* `Answers` to requests of *text_count* texts."""
    figures = {
        "texts_a_second": Spread.of([one.rate * text_count for one in many]),
        "p50_ms": Spread.of([one.latency_s(0.50) * 1e3 for one in many]),
        "p99_ms": Spread.of([one.latency_s(0.99) * 1e3 for one in many]),
    }
    if all(one.compute_s for one in many):
        overheads = [one.latency_s(0.5) - percentile(one.compute_s, 0.5) for one in many]
        figures["p50_beside_compute_ms"] = Spread.of([one * 1e3 for one in overheads])
    return figures
