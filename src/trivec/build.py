"""The only composition root: Settings in, the parts of a running service out.

It knows every constructor and no algorithm; its only choices are which implementation to build.
Heavy rooms are imported by the function that needs them.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

from starlette.types import ASGIApp

from trivec.accounts import Accounts
from trivec.accounts.stores import open_accounts
from trivec.api import ByteBudget, budget_bytes, build_app
from trivec.checkpoints import Checkpoint, find_folder, open_checkpoint
from trivec.checkpoints.catalogue import CATALOGUE
from trivec.core.clock import SystemClock
from trivec.core.errors import SettingInvalid
from trivec.core.events import ModelLoaded
from trivec.core.health import Health
from trivec.core.ports import Backend, Clock, Embedder, Observer
from trivec.core.types import ModelCard
from trivec.engine import Engine, Workers
from trivec.settings import Settings
from trivec.telemetry import Metrics, Observers, RequestLog, Tracing, lines_dropped
from trivec.tokenizer import Tokenizer

DEFAULT_MODEL = "all-minilm-l6-v2"


@dataclass(frozen=True, slots=True)
class Front:
    """What stands before any model is loaded, and after the last is gone."""

    settings: Settings
    clock: Clock
    accounts: Accounts
    metrics: Metrics
    observer: Observer
    tracing: Tracing | None
    memory: ByteBudget

    def app(
        self,
        embedders: Mapping[str, Embedder],
        health: Callable[[], Health],
        *,
        page: Callable[[], bytes] | None = None,
    ) -> ASGIApp:
        """The HTTP surface over *embedders*, none while loading; *page*: the metrics of more than us."""
        return build_app(
            embedders=embedders,
            accounts=self.accounts,
            observer=self.observer,
            clock=self.clock,
            limits=self.settings.http,
            health=health,
            metrics=page or self.metrics.page,
            metrics_open=self.settings.metrics_open,
            memory=self.memory,
        )

    def close(self) -> None:
        """Flush the ledger and the traces. Blocks."""
        self.accounts.stop()
        if self.tracing is not None:
            self.tracing.close()


class Surroundings(Protocol):
    """What models need around them."""

    @property
    def settings(self) -> Settings: ...
    @property
    def clock(self) -> Clock: ...
    @property
    def observer(self) -> Observer: ...


# Reading a vocabulary of 250,000 takes a second, and all that time the GIL: the second to take is
# one that compiling takes without it.
COMPILING_AFTER_S = 0.5


@dataclass(frozen=True, slots=True)
class Choice:
    """Which engine runs on which device, and why, in words for the operator."""

    backend: str
    device: str
    reason: str


@dataclass(frozen=True, slots=True)
class Certificate:
    """How close the fast arithmetic came to fp32 on the probe texts: cosines of dense vectors."""

    cosine_min: float
    cosine_mean: float
    summary: str


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """One model in memory."""

    checkpoint: Checkpoint
    backend: Backend
    card: ModelCard
    certificate: Certificate | None


@dataclass(frozen=True, slots=True)
class Models:
    """Every served model, ready to run on the workers that they share."""

    choice: Choice
    loaded: tuple[LoadedModel, ...]
    embedders: Mapping[str, Embedder]  # by id and by alias
    workers: Workers
    slot_count: int
    page: Callable[[], bytes] | None = None  # the front's own is all there is
    troubles: tuple[str, ...] = ()
    makes_first_key: bool = True


class Served(Protocol):
    """A model as the log and the greeting know it, wherever it runs."""

    @property
    def card(self) -> ModelCard: ...
    @property
    def certificate(self) -> Certificate | None: ...


class Drivers(Protocol):
    """What runs the models: threads of this process, or another process."""

    def start(self) -> None: ...
    async def stop(self, within_s: float) -> None: ...
    async def lost(self) -> str: ...


class Running(Protocol):
    """Every served model, wherever it runs."""

    @property
    def choice(self) -> Choice: ...
    @property
    def loaded(self) -> Sequence[Served]: ...
    @property
    def embedders(self) -> Mapping[str, Embedder]: ...
    @property
    def workers(self) -> Drivers: ...
    @property
    def slot_count(self) -> int: ...
    @property
    def page(self) -> Callable[[], bytes] | None:
        """The metrics of all processes, where there are several."""

    @property
    def troubles(self) -> tuple[str, ...]:
        """Why nothing can run for now."""

    @property
    def makes_first_key(self) -> bool:
        """Whether this process is the one that makes a new store's first key, and shows it."""


def open_front(settings: Settings, *, machine_bytes: int = 1 << 31) -> Front:
    """Everything but the models, on a machine of so much memory; quick. Raises `StartError`."""
    clock = SystemClock()
    metrics = Metrics(lines_dropped=lines_dropped)
    endpoint = settings.telemetry.trace_endpoint
    tracing = Tracing.to(endpoint) if endpoint else None
    heard: list[Observer] = [metrics, RequestLog(), *([tracing] if tracing else [])]
    return Front(
        settings=settings,
        clock=clock,
        accounts=open_accounts(settings, clock=clock),
        metrics=metrics,
        observer=Observers(*heard),
        tracing=tracing,
        memory=ByteBudget(
            budget_bytes(settings, machine_bytes=machine_bytes),
            connections_max=settings.http.connections_max,
        ),
    )


def check_models(settings: Settings) -> None:
    """Refuse what names no model before anything is begun. Raises `CheckpointRefused`."""
    for reference in settings.models:
        if reference not in CATALOGUE:
            find_folder(reference)


def load_models(
    settings: Settings, front: Surroundings, *, cores: int, hears_text: bool = True
) -> Models:
    """Load every model of *settings*; blocks for seconds. Raises `StartError`.

    *hears_text*: texts come to this process; to one that only gets token ids, tokenisers are waste.
    """
    choice = choose(settings)
    checkpoints = [
        open_checkpoint(reference, cache_dir=settings.data_dir / "models")
        for reference in settings.models or (DEFAULT_MODEL,)
    ]
    heard = list(checkpoints) if hears_text else []
    is_over = threading.Event()

    def read_vocabularies() -> list[Tokenizer]:
        is_over.wait(COMPILING_AFTER_S)
        return make_tokenizers(heard, front=front, cores=cores)

    with ThreadPoolExecutor(1) as beside:
        reading = beside.submit(read_vocabularies)
        try:
            loaded = [
                load_onto(choice, checkpoint, settings=settings, cores=cores)
                for checkpoint in checkpoints
            ]
        except BaseException:
            heard.clear()  # the refusal need not wait for them
            raise
        finally:
            is_over.set()
    return set_up(loaded, choice, front=front, tokenizers=reading.result())


def make_tokenizers(
    checkpoints: Sequence[Checkpoint], *, front: Surroundings, cores: int
) -> list[Tokenizer]:
    """A tokeniser for each of *checkpoints*, over threads that they share."""
    pool = ThreadPoolExecutor(cores, thread_name_prefix="trivec-tokenizer")
    return [
        Tokenizer(
            checkpoint.tokenizer_file,
            token_count_max=checkpoint.token_count_max,
            vocabulary_size=checkpoint.config.vocab_size,
            pool=pool,
            request_tokens_max=front.settings.http.request_tokens_max,
        )
        for checkpoint in checkpoints
    ]


def set_up(
    loaded: Sequence[LoadedModel],
    choice: Choice,
    *,
    front: Surroundings,
    tokenizers: Sequence[Tokenizer] = (),
) -> Models:
    """Give *loaded* models an engine each, and the workers that they share.

    *tokenizers*: one each, or none where every request brings token ids.
    """
    slot_count = min(model.backend.slot_count for model in loaded)
    workers = Workers(
        slot_count,
        spares_core=choice.device == "cpu",
        clock=front.clock,
        observer=front.observer,
    )
    engines = [
        Engine(
            model.card,
            tokenizer=tokenizer,
            backend=model.backend,
            workers=workers,
            bound=front.settings.queue,
            clock=front.clock,
            observer=front.observer,
        )
        for model, tokenizer in zip(loaded, tokenizers or (None,) * len(loaded), strict=True)
    ]
    return Models(choice, tuple(loaded), by_name(engines), workers, slot_count)


def choose(settings: Settings) -> Choice:
    """Decide what runs where. Raises `SettingInvalid` where that cannot be."""
    backend, device = settings.backend, settings.device
    if backend == "fake":
        return Choice("fake", "cpu", "--backend fake was asked for")
    if backend == "openvino" and device == "cuda":
        raise SettingInvalid("--backend openvino runs on cpu; use --backend torch with cuda")
    if backend == "openvino" or (backend == "auto" and device == "cpu"):
        return Choice("openvino", "cpu", f"--backend {backend} --device {device}")

    from trivec.backends.torch.device import choose_device, find_devices

    found = choose_device(device, find_devices())
    name = "torch" if backend == "torch" or found.device == "cuda" else "openvino"
    return Choice(name, found.device, found.reason)


def load_model(reference: str, *, settings: Settings, choice: Choice, cores: int) -> LoadedModel:
    """Open, check and load one model. Raises `CheckpointRefused`, `SettingInvalid`."""
    checkpoint = open_checkpoint(reference, cache_dir=settings.data_dir / "models")
    return load_onto(choice, checkpoint, settings=settings, cores=cores)


def load_onto(
    choice: Choice, checkpoint: Checkpoint, *, settings: Settings, cores: int
) -> LoadedModel:
    """Load *checkpoint* where *choice* says. Raises `CheckpointRefused`, `SettingInvalid`."""
    load = {"openvino": _load_openvino, "torch": _load_torch, "fake": _load_fake}[choice.backend]
    return load(checkpoint, settings, cores=cores, cache_dir=settings.data_dir / "models")


def _load_openvino(
    checkpoint: Checkpoint, settings: Settings, *, cores: int, cache_dir: Path
) -> LoadedModel:
    from trivec.backends.openvino import OpenVinoBackend

    backend = OpenVinoBackend.load(
        checkpoint, precision=settings.precision, cores=cores, cache_dir=cache_dir
    )
    card = replace(model_card(checkpoint, backend.precision), recipe=backend.recipe)
    earned = backend.certificate
    if earned is None:
        return LoadedModel(checkpoint, backend, card, None)
    certificate = Certificate(earned.dense.minimum, earned.dense.mean, earned.summary)
    card = replace(card, notes={"certificate": earned.summary})
    return LoadedModel(checkpoint, backend, card, certificate)


def _load_torch(
    checkpoint: Checkpoint, settings: Settings, *, cores: int, cache_dir: Path
) -> LoadedModel:
    from trivec.backends.torch.backend import TorchBackend

    backend = TorchBackend.load(checkpoint, precision=settings.precision, device=settings.device)
    card = model_card(checkpoint, backend.precision, notes=backend.notes)
    return LoadedModel(checkpoint, backend, card, None)


def _load_fake(
    checkpoint: Checkpoint, settings: Settings, *, cores: int, cache_dir: Path
) -> LoadedModel:
    from trivec.backends.fake import FakeBackend

    backend = FakeBackend(
        dimensions=checkpoint.config.hidden_size, outputs=checkpoint.outputs, slot_count=cores
    )
    return LoadedModel(checkpoint, backend, model_card(checkpoint, "fake"), None)


def model_card(
    checkpoint: Checkpoint, precision: str, *, notes: Mapping[str, str] = MappingProxyType({})
) -> ModelCard:
    """What clients may know of *checkpoint* at *precision*."""
    return ModelCard(
        id=checkpoint.id,
        token_count_max=checkpoint.token_count_max,
        vocabulary_size=checkpoint.config.vocab_size,
        dimensions=checkpoint.config.hidden_size,
        outputs=checkpoint.outputs,
        precision=precision,
        created=checkpoint.created,
        owned_by=checkpoint.owned_by,
        dimensions_selectable=checkpoint.dimensions_selectable,
        verified=checkpoint.verified,
        aliases=checkpoint.aliases,
        notes=notes,
    )


def loaded_event(model: Served, *, load_s: float) -> ModelLoaded:
    """That *model* is ready, for the observer."""
    certificate = model.certificate
    return ModelLoaded(
        card=model.card,
        load_s=load_s,
        cosine_min=certificate.cosine_min if certificate else None,
        cosine_mean=certificate.cosine_mean if certificate else None,
    )


def by_name(engines: Sequence[Embedder]) -> Mapping[str, Embedder]:
    """*engines* by id and alias. Raises `SettingInvalid` where two would share a name."""
    named: dict[str, Embedder] = {}
    for engine in engines:
        for name in (engine.card.id, *engine.card.aliases):
            if named.setdefault(name, engine) is not engine:
                raise SettingInvalid(
                    f"two models are called {name}; serve one of them as ANOTHER_ID=FOLDER"
                )
    return MappingProxyType(named)
