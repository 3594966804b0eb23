"""Bulk work on a Ray cluster, with an engine in each actor.

`embed_dataset` is a stage of a Ray Data pipeline, for what is read and written by the cluster.
`RayEncoder` is an encoder of `jobs`, for files of one machine: `trivec embed --ray`. Either way
texts go out in shards, an engine makes batches of tokens of them, and a shard whose actor or node
dies is embedded by another.
"""

import asyncio
import json
import os
import re
import socket
import threading
from collections import deque
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast
from uuid import uuid4

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.fs
import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from trivec.build import load_models, open_parts, text_encoder
from trivec.core.errors import JobFailed, TrivecError
from trivec.core.types import ModelCard, Output
from trivec.jobs import GO_ON
from trivec.jobs.corpus import cuts
from trivec.jobs.encoders import Encoded, ModelIdentity, Truncate
from trivec.jobs.results import TRUNCATED, DType, Layout, check_card, parse_outputs
from trivec.server.processes import BROKEN
from trivec.settings import BULK_LIMITS, SECRETS, Settings, load_settings

if TYPE_CHECKING:
    from ray.data import Dataset

SHARD_ROWS, SHARD_CHARACTERS = 2048, 1024 * 1024  # of a block, whichever is first
PLACES = 2  # shards in one actor: while one is embedded, the next is tokenised
DEATHS_MAX = 8  # of actors under one shard: it may be what they die of
CONNECT_S_MAX = 10.0
RETURN_S = 1.0  # between two looks whether a dead actor is there again
AWAY_S_MAX = 600.0  # for a node that comes in the place of one that is gone
ERROR = "error"  # column: why a row has no vector
NO_SETTINGS: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class BulkWork:
    """What is made of each text, and by what."""

    settings: Settings  # of one model
    outputs: Output = Output.DENSE
    truncate: Truncate = "none"
    prompt: str | None = None  # its name


class BulkEngine:
    """A model and its workers on an event loop of their own, for the threads of an actor."""

    def __init__(self, work: BulkWork) -> None:
        """Blocks until the model is loaded. Raises `StartError`."""
        cores = int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1)) or 1
        models = load_models(work.settings, open_parts(work.settings), cores=cores)
        self.card = models.cards[0]
        self._encoder = text_encoder(
            models, work.outputs, truncate=work.truncate, prompt_name=work.prompt
        )
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="engine", daemon=True).start()

        async def run() -> None:
            models.workers.start()
            started.set_result(None)
            await models.workers.lost()
            os._exit(BROKEN)  # only another process can help, and Ray starts one

        started: Future[None] = Future()
        self._running = asyncio.run_coroutine_threadsafe(run(), self._loop)
        started.result()

    def describe(self) -> tuple[bytes, ModelIdentity]:
        """The model's card, as JSON, and what its vectors depend on."""
        return msgspec.json.encode(self.card, enc_hook=dict), self._encoder.model

    def encode(self, texts: Sequence[str]) -> Encoded:
        """See `jobs.encoders.TextEncoder`; blocks."""
        return self.begin(texts).result()

    def begin(self, texts: Sequence[str]) -> "Future[Encoded]":
        """The same, to be waited for."""
        return asyncio.run_coroutine_threadsafe(self._encoder.encode(texts), self._loop)


class RayEncoder:
    """An encoder over actors on a cluster.

    A shard whose actor dies goes to another one, and a dead one is used again when Ray has started
    it again, wherever that is.
    """

    def __init__(self, actors: Sequence[Any]) -> None:
        """*actors*: handles of `BulkEngine`s, of the same work."""
        self.model: ModelIdentity = {}
        self.card: ModelCard
        self.shards_at_once = (PLACES + 1) * len(actors)  # and one of each on its way to the disk
        self.actors = actors
        self._free: asyncio.Queue[Any] = asyncio.Queue()  # an actor as often as it has room
        self._open_count = 0  # shards that an actor has
        self._tasks: set[asyncio.Task[None]] = set()
        self._fault: TrivecError | None = None

    async def start(self) -> None:
        """Wait for the first actor's model. Raises what loading it raised."""
        tasks = [self._join(actor, PLACES) for actor in self.actors]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if self._fault is not None:
            raise self._fault

    async def encode(self, texts: Sequence[str]) -> Encoded:
        """See `TextEncoder`."""
        # Each place may be one of a node that is gone, beside the deaths of these texts' doing.
        for _ in range(PLACES * len(self.actors) + DEATHS_MAX):
            actor = await self._take()
            self._open_count += 1
            try:
                encoded = cast(Encoded, await actor.encode.remote(texts))
            except RayTaskError as fault:
                raise _own(fault) from fault
            except RayError:  # its process or its node is gone
                self._join(actor, 1)
                continue
            finally:
                self._open_count -= 1
            self._free.put_nowait(actor)
            return encoded
        raise JobFailed("one actor after another died of the same texts; Ray's log says how")

    async def _take(self) -> Any:
        """The next actor that has room. Raises `JobFailed` where none is left, and none comes."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(AWAY_S_MAX):
                    actor = await self._free.get()
                if self._fault is not None:
                    raise self._fault
                return actor
            if not self._open_count:
                raise JobFailed(f"the cluster has had no actor for {AWAY_S_MAX:.0f} s. {GO_ON}")

    def _join(self, actor: Any, places: int) -> "asyncio.Task[None]":
        """Use *actor* for so many more shards at a time, once its model is loaded."""

        async def join() -> None:
            while self._fault is None:
                try:
                    card, identity = await actor.describe.remote()
                except RayError as fault:
                    if isinstance(fault, RayActorError) and not fault.actor_init_failed:
                        await asyncio.sleep(RETURN_S)
                        continue
                    self._fault = _own(fault)  # as it would be in every place it is started
                else:
                    self._check(card, identity)
                break
            for _ in range(places):
                self._free.put_nowait(actor)

        task = asyncio.create_task(join())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _check(self, card: bytes, identity: ModelIdentity) -> None:
        """Keep what the first actor says of its model; the others must say the same."""
        if not self.model:
            self.model = identity
            self.card = msgspec.json.decode(
                card, type=ModelCard, dec_hook=lambda kind, value: kind(value)
            )
        elif identity != self.model:
            self._fault = JobFailed(
                f"the nodes of the cluster differ: one has {identity}, another {self.model}; name "
                "one arithmetic with --precision"
            )

    def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        for actor in self.actors:
            ray.kill(actor)


@asynccontextmanager
async def ray_encoder(
    address: str, work: BulkWork, *, actors: int | None = None, cpus: int | None = None
) -> AsyncIterator[RayEncoder]:
    """An encoder on the cluster at *address*, until the block ends.

    *actors*: None for one a GPU of the cluster where it has any, else one a node. *cpus* of each:
    None for one beside a GPU, else all that the smallest node has. Raises `JobFailed`, `StartError`.
    """
    host, _, port = address.rpartition(":")
    try:
        if host and port.isdigit():  # Ray itself would try for minutes
            socket.create_connection((host, int(port)), CONNECT_S_MAX).close()
        await asyncio.to_thread(ray.init, address, log_to_driver=False, logging_level="ERROR")
    except (OSError, RuntimeError, ValueError) as fault:
        raise JobFailed(f"no Ray cluster at {address}: {fault}") from fault
    try:
        nodes = [one["Resources"] for one in ray.nodes() if one["Alive"]]
        runs_on_gpu = work.settings.device != "cpu" and work.settings.backend in ("auto", "torch")
        gpus = sum(int(one.get("GPU", 0)) for one in nodes) if runs_on_gpu else 0
        cores = [int(one["CPU"]) for one in nodes if one.get("CPU", 0) >= 1]
        if not cores:
            raise JobFailed(f"the cluster at {address} has no CPU")
        engine = ray.remote(BulkEngine).options(
            num_cpus=cpus or (1 if gpus else min(cores)),
            num_gpus=1 if gpus else 0,
            max_concurrency=PLACES + 1,
            max_restarts=-1,
            scheduling_strategy="SPREAD",
        )
        encoder = RayEncoder([engine.remote(work) for _ in range(actors or gpus or len(cores))])
        try:
            await encoder.start()
            yield encoder
        finally:
            encoder.close()
    finally:
        await asyncio.to_thread(ray.shutdown)


def embed_dataset(
    ds: "Dataset",
    *,
    model: str,
    outputs: str = "dense",
    text_column: str = "text",
    dtype: DType = "float32",
    dimensions: int | None = None,
    prompt: str | None = None,
    truncate: Truncate = "none",
    settings: Mapping[str, Any] = NO_SETTINGS,
    manifest: str | None = None,
    actors: int | tuple[int, int] = 1,
    cpus: int = 1,
    gpus: int = 0,
    **options: Any,
) -> "Dataset":
    """*ds* with the vectors of *text_column*, in the columns that `trivec embed` writes.

    A row that has none keeps its place, and the column `error` says why. *manifest* is a folder that
    all nodes reach, as a path or URI: what is embedded is kept there, and a pipeline that is run
    again reads it back. *settings* are as in a settings file; *actors* are as many, or from so few
    to so many; *options* go to `Dataset.map_batches`. Raises `SettingInvalid`, `JobFailed`.
    """
    from ray.data import ActorPoolStrategy

    least, most = (actors, actors) if isinstance(actors, int) else actors
    own = load_settings({**settings, "models": (model,), **BULK_LIMITS}, os.environ)
    work = BulkWork(without_secrets(own), parse_outputs(outputs), truncate, prompt)
    return ds.map_batches(
        DatasetStage,
        fn_constructor_args=(work, text_column, dimensions, dtype, manifest),
        batch_size=None,  # a block, whose cuts do not depend on what ran before
        batch_format="pyarrow",
        compute=ActorPoolStrategy(min_size=least, max_size=most),
        num_cpus=cpus,
        num_gpus=gpus,
        **options,
    )


class DatasetStage:
    """What an actor of Ray Data does: blocks in, the same rows with their vectors out."""

    def __init__(
        self,
        work: BulkWork,
        text_column: str,
        dimensions: int | None,
        dtype: DType,
        manifest: str | None,
    ) -> None:
        self._engine = engine = BulkEngine(work)
        check_card(engine.card, work.outputs, dimensions, work.prompt)
        self._text_column = text_column
        self._layout = Layout(
            work.outputs,
            engine.card.dimensions,
            dimensions,
            dtype,
            marks_truncated=work.truncate != "none",
        )
        self._kept: KeptShards | None = None
        if manifest is not None:
            job = {
                "model": dict(engine.describe()[1]),
                "outputs": int(work.outputs),
                "dimensions": dimensions,
                "dtype": dtype,
                "truncate": work.truncate,
            }
            self._kept = KeptShards(manifest, job)

    def __call__(self, block: pa.Table) -> Iterator[pa.Table]:
        """Shards of *block*, in order; one is on the device while the next is tokenised."""
        texts = block[self._text_column].to_pylist()
        ahead = deque[tuple[int, int, _Begun]]()
        for first in range(0, len(texts), SHARD_ROWS):
            for start, end in cuts(texts[first : first + SHARD_ROWS], SHARD_CHARACTERS):
                own = texts[first + start : first + end]
                ahead.append((first + start, end - start, self._begin(own)))
                if len(ahead) > PLACES:
                    yield self._finish(block, *ahead.popleft())
        while ahead:
            yield self._finish(block, *ahead.popleft())

    def _begin(self, texts: Sequence[object]) -> "_Begun":
        digest = sha256("\0".join(map(repr, texts)).encode("utf-8", "surrogatepass")).hexdigest()
        if self._kept is not None and (kept := self._kept.read(digest)) is not None:
            return _Begun(digest, kept=kept)
        good = [i for i, text in enumerate(texts) if isinstance(text, str) and text]
        named = [str(texts[i]) for i in good]
        return _Begun(digest, good, self._engine.begin(named) if good else None)

    def _finish(self, block: pa.Table, start: int, count: int, begun: "_Begun") -> pa.Table:
        columns = begun.kept
        if columns is None:
            columns = self._columns(begun, count)
            if self._kept is not None:
                self._kept.write(begun.digest, columns)
        rows = block.slice(start, count)
        for name in columns.column_names:
            rows = rows.append_column(name, columns[name])
        return rows

    def _columns(self, begun: "_Begun", count: int) -> pa.Table:
        """The vectors of so many rows, null where there is none, and why."""
        encoded = begun.encoded.result() if begun.encoded else Encoded(None, 0)
        errors: list[str | None] = ["has no text"] * count
        places: list[int | None] = [None] * count  # of each row in the vectors
        truncated = np.zeros(count, bool)
        index = 0
        for i, row in enumerate(begun.good):
            errors[row] = encoded.bad.get(i)
            if errors[row] is None:
                places[row], index = index, index + 1
        truncated[[begun.good[i] for i in encoded.truncated]] = True
        columns = {
            name: column.take(pa.array(places, pa.int64()))
            for name, column in self._layout.columns(encoded.vectors).items()
        }
        if self._layout.marks_truncated:
            columns[TRUNCATED] = pa.array(truncated)
        return pa.table({**columns, ERROR: pa.array(errors, pa.string())})


@dataclass(frozen=True, slots=True)
class _Begun:
    """A shard on its way: what was kept of it, or what is being made of it."""

    digest: str  # sha256 over its texts
    good: Sequence[int] = ()  # rows that have a text
    encoded: "Future[Encoded] | None" = None
    kept: pa.Table | None = None


class KeptShards:
    """A folder with the vectors of each shard under the digest of its texts, and of which job."""

    def __init__(self, uri: str, job: Mapping[str, Any]) -> None:
        """Raises `JobFailed` where the folder is another job's."""
        self._files, self._path = pyarrow.fs.FileSystem.from_uri(uri)
        self._files.create_dir(self._path, recursive=True)
        text = json.dumps(job, indent=2, sort_keys=True).encode()
        with suppress(FileNotFoundError):
            with self._files.open_input_stream(f"{self._path}/manifest.json") as file:
                begun = file.read()
            if begun != text:
                raise JobFailed(f"{uri} was begun otherwise: {begun.decode()}; name another folder")
        self._write("manifest.json", text)

    def read(self, digest: str) -> pa.Table | None:
        """What was kept of a shard, if it is whole."""
        try:
            with self._files.open_input_file(f"{self._path}/{digest}.arrow") as file:
                return pa.ipc.open_file(file).read_all()
        except (FileNotFoundError, pa.ArrowException):
            return None

    def write(self, digest: str, columns: pa.Table) -> None:
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, columns.schema) as writer:
            writer.write_table(columns)
        self._write(f"{digest}.arrow", sink.getvalue())

    def _write(self, name: str, content: "bytes | pa.Buffer") -> None:
        new = f"{self._path}/{name}.{uuid4().hex}.tmp"
        with self._files.open_output_stream(new) as file:
            file.write(content)
        self._files.move(new, f"{self._path}/{name}")


def without_secrets(settings: Settings) -> Settings:
    """*settings* as they may go to the nodes of a cluster, where bulk work needs no key."""
    return settings.model_copy(update=dict.fromkeys(SECRETS))


def _own(fault: RayError) -> TrivecError:
    """What an actor raised, or what its start did, where that is an error of ours."""
    cause = getattr(fault, "cause", None)
    if isinstance(cause, TrivecError):
        return cause
    ours = re.findall(r"^trivec\.core\.errors\.\w+: (.+)", str(fault), re.MULTILINE)
    return JobFailed(ours[-1] if ours else f"an actor of the cluster failed: {str(fault)[-500:]}")
