"""Composition root: from Settings to the parts of a running service, in one process or several.

The only file where classes of several packages meet. It chooses implementations and computes nothing;
packages that are slow to import are imported by the function that needs them. Of several processes
the engine process has models and no HTTP; an API process has HTTP, and its models at a distance.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, TypeVar

from starlette.types import ASGIApp

from trivec.accounts import Accounts
from trivec.accounts.stores import open_accounts, open_job_store
from trivec.api import AppState, ByteBudget, answer_line, budget_bytes, build_app
from trivec.checkpoints import Checkpoint, find_folder, open_checkpoint
from trivec.checkpoints.catalogue import CATALOGUE
from trivec.core.clock import SystemClock
from trivec.core.errors import FieldInvalid, SettingInvalid
from trivec.core.events import ModelLoaded
from trivec.core.health import HEALTHY, Health
from trivec.core.ports import Backend, Clock, Embedder, Observer, OnProgress, no_progress
from trivec.core.types import CertificateSummary, ModelCard, Output, TokenRules
from trivec.engine import Engine, Workers
from trivec.jobs.batches import Batches, JobRunner
from trivec.jobs.files import Files
from trivec.jobs.records import JobStore
from trivec.models.pooling import use_one_blas_thread
from trivec.playground import page_operations
from trivec.settings import Settings
from trivec.telemetry import (
    Metrics,
    ObserverQueue,
    Observers,
    RequestLog,
    Tracing,
    lines_dropped,
    merged_pages,
)
from trivec.tokenizer import Tokenizer
from trivec.tokenizer.encodings import token_table

if TYPE_CHECKING:
    from trivec.ipc.client import EngineClient
    from trivec.ipc.folder import Served, SharedFolder
    from trivec.jobs.encoders import EmbedderEncoder, Truncate

ENGINE = "engine"  # the engine process's name
FIRST_API = "api-1"  # the API process that makes the first key, greets for all, and runs batch jobs
DEFAULT_MODEL = "all-minilm-l6-v2"
Named = TypeVar("Named", bound=Checkpoint | ModelCard)
# Reading a vocabulary of 250,000 takes a second, and all that time the GIL: it had better be the
# second in which compiling does without.
COMPILING_AFTER_S = 0.5


@dataclass(frozen=True, slots=True)
class Parts:
    """What models need of their process, whether it has HTTP or not."""

    settings: Settings
    clock: Clock
    metrics: Metrics
    observer: Observer


@dataclass(frozen=True, slots=True)
class ServerParts(Parts):
    """Everything an HTTP process has before its models are loaded."""

    observer: ObserverQueue
    accounts: Accounts
    tracing: Tracing | None
    memory: ByteBudget
    batches: Batches | None  # None: their face is left out

    def app(
        self,
        embedders: Mapping[str, Embedder],
        health: Callable[[], Health],
        *,
        metrics_page: Callable[[], bytes] | None = None,
    ) -> ASGIApp:
        """HTTP surface of *embedders*, none while loading; *metrics_page*: None for our own."""
        settings = self.settings
        return build_app(
            embedders=embedders,
            accounts=self.accounts,
            observer=self.observer,
            clock=self.clock,
            limits=settings.http,
            health=health,
            metrics=metrics_page or self.metrics.page,
            metrics_open=settings.metrics_open,
            memory=self.memory,
            batches=self.batches,
            faces=settings.faces,
            pages=page_operations(has_keys=not settings.no_auth) if settings.http.page else (),
        )

    def batch_runner(self, embedders: Mapping[str, Embedder]) -> JobRunner | None:
        """What works on batch jobs with *embedders*, where their face is served."""
        if self.batches is None:
            return None
        app = AppState(
            embedders,
            self.accounts,
            self.observer,
            self.clock,
            self.settings.http,
            health=lambda: HEALTHY,
            metrics=None,
            memory=ByteBudget(self.memory.bytes_max),  # its own: requests keep theirs
        )
        return JobRunner(
            self.batches,
            answer=partial(answer_line, app),
            names={name: one.card.names for name, one in embedders.items()},
            accounts=self.accounts,
            line_bytes_max=self.settings.http.body_bytes_max,
            clock=self.clock,
            observer=self.observer,
        )

    def close(self) -> None:
        """Flush the log, the ledger and the traces. Blocks."""
        self.observer.close()
        self.accounts.stop()
        if self.batches is not None:
            self.batches.store.close()
        if self.tracing is not None:
            self.tracing.close()


@dataclass(frozen=True, slots=True)
class Choice:
    """Which backend runs on which device, and why, in words for the operator."""

    backend: str
    device: str
    reason: str


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """One model in this process's memory."""

    checkpoint: Checkpoint
    backend: Backend
    card: ModelCard
    certificate: CertificateSummary | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Models:
    """Every served model, in this process or in the engine process."""

    choice: Choice
    cards: Sequence[ModelCard]
    certificates: Mapping[str, CertificateSummary]  # by model id; none where the arithmetic is fp32
    embedders: Mapping[str, Embedder]  # by id and by alias
    workers: "Workers | EngineClient"  # what runs them: threads here, or another process
    slot_count: int
    loaded: tuple[LoadedModel, ...] = ()  # those in this process
    metrics_page: Callable[[], bytes] | None = None  # of all processes, where there are several
    problems: Callable[[], Sequence[str]] = tuple  # why nothing can run for now
    leads: bool = True  # of the HTTP processes: makes and shows the first key, works on batch jobs

    def loaded_events(self, *, load_s: float) -> Iterator[ModelLoaded]:
        """That each model is ready, for the observer."""
        for card in self.cards:
            yield ModelLoaded(card, load_s, self.certificates.get(card.id))


def open_parts(settings: Settings, *further: Observer) -> Parts:
    """What the models of a process without HTTP need; *further* observers hear what ours do.

    Numpy's products have one thread from here on: slots and requests have threads of their own.
    """
    use_one_blas_thread()
    metrics = Metrics(lines_dropped=lines_dropped)
    return Parts(settings, SystemClock(), metrics, Observers(metrics, RequestLog(), *further))


def open_server_parts(settings: Settings, *, machine_bytes: int = 1 << 31) -> ServerParts:
    """Everything but the models, on a machine of so much memory; quick. Raises `StartError`."""
    endpoint = settings.telemetry.trace_endpoint
    tracing = Tracing.to(endpoint) if endpoint else None
    parts = open_parts(settings, *([tracing] if tracing else []))
    observer = ObserverQueue(parts.observer)
    parts.metrics.catch_up = observer.flush
    return ServerParts(
        settings,
        parts.clock,
        parts.metrics,
        observer,
        accounts=open_accounts(settings, clock=parts.clock),
        tracing=tracing,
        memory=ByteBudget(
            budget_bytes(settings, machine_bytes=machine_bytes),
            connections_max=settings.http.connections_max,
        ),
        batches=open_batches(settings, clock=parts.clock) if "batches" in settings.faces else None,
    )


def open_batches(settings: Settings, *, clock: Clock) -> Batches:
    """Files and batch jobs, in the store and in the folder of *settings*; touches neither."""
    store = JobStore(open_job_store(settings), settings.batch, clock=clock)
    url = settings.batch.files or str((settings.data_dir / "files").absolute())
    return Batches(store, Files(store, settings.batch, url=url))


def check_models(settings: Settings) -> None:
    """Raise `CheckpointRefused` for a name of no model, before anything is begun.

    `SettingInvalid` where the token encoding that requests are to be decoded with is not here.
    """
    for reference in settings.models:
        if reference not in CATALOGUE:
            find_folder(reference)
    encoding = settings.http.token_encoding
    if encoding not in (None, "model"):
        try:
            token_table(encoding)
        except FieldInvalid as absent:
            raise SettingInvalid(f"token_encoding {encoding}: {absent}") from absent


def load_models(
    settings: Settings,
    context: Parts,
    *,
    cores: int,
    takes_text: bool = True,
    on_progress: OnProgress = no_progress,
) -> Models:
    """Load every model of *settings*; blocks for seconds. Raises `StartError`.

    *takes_text*: requests bring texts; one that brings only token ids needs no tokeniser.
    """
    choice = choose(settings)
    checkpoints = with_aliases(
        [
            open_checkpoint(
                reference, cache_dir=settings.data_dir / "models", on_progress=on_progress
            )
            for reference in settings.models or (DEFAULT_MODEL,)
        ],
        settings.aliases,
    )
    has_compiled = threading.Event()

    def read_vocabularies() -> list[Tokenizer]:
        has_compiled.wait(COMPILING_AFTER_S)
        return make_tokenizers(checkpoints, context=context, cores=cores) if takes_text else []

    # Not a `with`: a refusal need not wait for the vocabularies.
    reading = (pool := ThreadPoolExecutor(1)).submit(read_vocabularies)
    pool.shutdown(wait=False)
    loaded = [
        load_checkpoint(checkpoint, choice, settings=settings, cores=cores, on_progress=on_progress)
        for checkpoint in checkpoints
    ]
    has_compiled.set()
    return set_up(loaded, choice, context=context, tokenizers=reading.result())


def with_aliases(models: Sequence[Named], aliases: Sequence[str]) -> list[Named]:
    """*models* with further names, each as NAME=ID. Raises `SettingInvalid`."""
    named: list[Named] = list(models)
    for name, _, model in (pair.partition("=") for pair in aliases):
        i = next((i for i, one in enumerate(named) if model in (one.id, *one.aliases)), None)
        if i is None:
            raise SettingInvalid(
                f"alias {name}={model} is of a model that is not served; "
                f"served are {', '.join(one.id for one in named)}"
            )
        named[i] = replace(named[i], aliases=(*named[i].aliases, name))
    return named


def choose(settings: Settings) -> Choice:
    """Which backend and device *settings* ask for. Raises `SettingInvalid` if they cannot be."""
    backend, device = settings.backend, settings.device
    if backend == "fake":
        return Choice("fake", "cpu", "backend fake was asked for")
    if backend == "openvino" and device == "cuda":
        raise SettingInvalid("backend openvino runs on cpu; use backend torch for device cuda")
    if backend == "openvino" or (backend == "auto" and device == "cpu"):
        return Choice("openvino", "cpu", f"backend {backend}, device {device}")

    from trivec.backends.torch.device import choose_device, find_devices

    found = choose_device(device, find_devices())
    name = "torch" if backend == "torch" or found.device == "cuda" else "openvino"
    return Choice(name, found.device, found.reason)


def load_checkpoint(
    checkpoint: Checkpoint,
    choice: Choice,
    *,
    settings: Settings,
    cores: int,
    on_progress: OnProgress = no_progress,
) -> LoadedModel:
    """Load *checkpoint* on its backend. Raises `CheckpointRefused`, `SettingInvalid`."""
    if choice.backend == "fake":
        from trivec.backends.fake import FakeBackend

        fake = FakeBackend(
            dimensions=checkpoint.dimensions, outputs=checkpoint.outputs, slot_count=cores
        )
        return LoadedModel(checkpoint, fake, model_card(checkpoint, "fake"), None)

    if choice.backend == "torch":
        from trivec.backends.torch.backend import TorchBackend

        on_progress(f"{checkpoint.id}: loading on {choice.device}", None)
        on_torch = TorchBackend.load(
            checkpoint, precision=settings.precision, device=settings.device
        )
        card = model_card(checkpoint, on_torch.precision, notes=on_torch.notes)
        return LoadedModel(checkpoint, on_torch, card, None)

    from trivec.backends.openvino import OpenVinoBackend

    cache_dir = settings.data_dir / "models"
    backend = OpenVinoBackend.load(
        checkpoint,
        precision=settings.precision,
        cores=cores,
        cache_dir=cache_dir,
        on_progress=on_progress,
    )
    card = replace(model_card(checkpoint, backend.precision), recipe=backend.recipe)
    earned = backend.certificate
    if earned is None:
        return LoadedModel(checkpoint, backend, card, None)
    certificate = CertificateSummary(earned.main.minimum, earned.main.mean, earned.summary)
    card = replace(card, notes={**card.notes, "certificate": earned.summary})
    return LoadedModel(checkpoint, backend, card, certificate)


def model_card(
    checkpoint: Checkpoint, precision: str, *, notes: Mapping[str, str] = MappingProxyType({})
) -> ModelCard:
    """What clients may know of *checkpoint* at *precision*."""
    return ModelCard(
        id=checkpoint.id,
        token_count_max=checkpoint.token_count_max,
        vocabulary_size=checkpoint.config.vocab_size,
        dimensions=checkpoint.dimensions,
        outputs=checkpoint.outputs,
        precision=precision,
        created=checkpoint.created,
        owned_by=checkpoint.owned_by,
        dimensions_selectable=checkpoint.dimensions_selectable,
        matryoshka_dimensions=checkpoint.matryoshka_dimensions,
        licence=checkpoint.licence,
        layer_norm_before_cut=checkpoint.layer_norm_before_cut,
        prompts=checkpoint.prompts,
        default_prompt_name=checkpoint.default_prompt_name,
        include_prompt=checkpoint.include_prompt,
        labels=checkpoint.labels,
        late_chunking=checkpoint.late_chunking,
        verified=checkpoint.verified,
        aliases=checkpoint.aliases,
        notes={**notes, **({"assumed": checkpoint.assumed} if checkpoint.assumed else {})},
    )


def make_tokenizers(
    checkpoints: Sequence[Checkpoint], *, context: Parts, cores: int
) -> list[Tokenizer]:
    """A tokeniser for each of *checkpoints*, on threads that they share."""
    make = tokenizer_factory(context.settings, cores)
    return [make(one.tokenizer_file, one, one.config.vocab_size, one.rules) for one in checkpoints]


def tokenizer_factory(
    settings: Settings, cores: int
) -> Callable[[Path, Checkpoint | ModelCard, int, TokenRules], Tokenizer]:
    """Makes tokenisers that share threads: of a file, its model, its count of ids, and its rules."""
    pool = ThreadPoolExecutor(cores, thread_name_prefix="trivec-tokenizer")
    return lambda file, model, vocabulary_size, rules: Tokenizer(
        file,
        token_count_max=model.token_count_max,
        vocabulary_size=vocabulary_size,
        pool=pool,
        request_tokens_max=settings.http.request_tokens_max,
        rules=rules,
        include_prompt=model.include_prompt,
    )


def set_up(
    loaded: Sequence[LoadedModel],
    choice: Choice,
    *,
    context: Parts,
    tokenizers: Sequence[Tokenizer] = (),
) -> Models:
    """Give *loaded* models an engine each, and the workers that they share.

    *tokenizers*: one each, or none where every request brings token ids.
    """
    slot_count = min(model.backend.slot_count for model in loaded)
    workers = Workers(
        slot_count,
        coalesces=choice.device == "cpu",
        clock=context.clock,
        observer=context.observer,
    )
    context.metrics.watch(workers.scheduler.loads)
    engines = [
        Engine(
            model.card,
            tokenizer=tokenizer,
            backend=model.backend,
            workers=workers,
            limits=context.settings.queue,
        )
        for model, tokenizer in zip(loaded, tokenizers or (None,) * len(loaded), strict=True)
    ]
    return Models(
        choice=choice,
        cards=[model.card for model in loaded],
        certificates={one.card.id: one.certificate for one in loaded if one.certificate},
        embedders=by_name(engines),
        workers=workers,
        slot_count=slot_count,
        loaded=tuple(loaded),
    )


def text_encoder(
    models: Models, outputs: Output, *, truncate: "Truncate", prompt_name: str | None
) -> "EmbedderEncoder":
    """Bulk work's encoder over the first of *models*, which are in this process."""
    from trivec.jobs.encoders import EmbedderEncoder

    card = models.cards[0]
    prompt = card.prompts.get(prompt_name or card.default_prompt_name or "", "")
    identity = {
        "id": card.id,
        "files": models.loaded[0].checkpoint.digest,
        "precision": card.precision,
        "recipe": card.recipe,
        "backend": models.choice.backend,
        "dimensions": card.dimensions,
        "prompt": prompt,
    }
    embedder = models.embedders[card.id]
    return EmbedderEncoder(embedder, outputs, model=identity, truncate=truncate, prompt=prompt)


def by_name(embedders: Sequence[Embedder]) -> Mapping[str, Embedder]:
    """*embedders* by id and alias. Raises `SettingInvalid` where two would share a name."""
    named: dict[str, Embedder] = {}
    for embedder in embedders:
        for name in embedder.card.names:
            if named.setdefault(name, embedder) is not embedder:
                raise SettingInvalid(
                    f"two models are called {name}; serve one of them as ANOTHER_ID=FOLDER"
                )
    return MappingProxyType(named)


def served(models: Models) -> "Served":
    """What other processes are told of *models*, which are in this one."""
    from trivec import __version__
    from trivec.ipc.folder import Served, ServedModel

    return Served(
        version=__version__,
        backend=models.choice.backend,
        device=models.choice.device,
        reason=models.choice.reason,
        slot_count=models.slot_count,
        models=tuple(
            ServedModel(
                one.card,
                str(one.checkpoint.tokenizer_file),
                one.certificate,
                one.checkpoint.rules,
            )
            for one in models.loaded
        ),
    )


def connect_models(parts: ServerParts, *, folder: "SharedFolder", name: str, cores: int) -> Models:
    """The engine process's models for API process *name*; blocks until that has loaded them."""
    from trivec.ipc.client import EngineClient, RemoteEmbedder

    what = folder.read_served()
    client = EngineClient(folder, name, served=what, metrics=parts.metrics.page)

    def metrics_page() -> bytes:
        """Of all processes. An engine process that is away is not ready, whatever its last page says."""
        pages = dict(folder.read_metrics())
        if client.problems:
            pages.pop(ENGINE, None)
        return merged_pages({**pages, name: parts.metrics.page()})

    make_tokenizer = tokenizer_factory(parts.settings, cores)
    embedders = [
        RemoteEmbedder(
            index,
            one.card,
            make_tokenizer(Path(one.tokenizer_file), one.card, one.card.vocabulary_size, one.rules),
            client,
        )
        for index, one in enumerate(what.models)
    ]
    return Models(
        choice=Choice(what.backend, what.device, what.reason),
        cards=[one.card for one in what.models],
        certificates={one.card.id: one.certificate for one in what.models if one.certificate},
        embedders=by_name(embedders),
        workers=client,
        slot_count=what.slot_count,
        metrics_page=metrics_page,
        problems=lambda: client.problems,
        leads=name == FIRST_API,
    )
