"""The composition root of several processes: what `build` makes, on the two sides of a socket.

The engine process has models and no HTTP; an API process has HTTP, and its models at a distance.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from trivec import __version__
from trivec.build import Certificate, Choice, Front, Models, by_name
from trivec.core.clock import SystemClock
from trivec.core.ports import Clock, Embedder, Observer
from trivec.core.types import ModelCard
from trivec.ipc.client import EngineClient, RemoteEmbedder
from trivec.ipc.folder import Served, ServedModel, SharedFolder
from trivec.settings import Settings
from trivec.telemetry import Metrics, Observers, RequestLog, lines_dropped, merged_pages
from trivec.tokenizer import Tokenizer

FIRST_API = "api-1"  # makes the first key, and greets for all


@dataclass(frozen=True, slots=True)
class EngineParts:
    """What models need around them in a process without HTTP."""

    settings: Settings
    clock: Clock
    metrics: Metrics
    observer: Observer


@dataclass(frozen=True, slots=True)
class RemoteModel:
    """A model of the engine process, as an API process knows it."""

    card: ModelCard
    certificate: Certificate | None


@dataclass(frozen=True, slots=True)
class RemoteModels:
    """Every model of the engine process, as `Models` are those of this one."""

    choice: Choice
    loaded: Sequence[RemoteModel]
    embedders: Mapping[str, Embedder]
    workers: EngineClient
    slot_count: int
    page: Callable[[], bytes]  # the metrics of all processes
    makes_first_key: bool

    @property
    def troubles(self) -> tuple[str, ...]:
        return self.workers.troubles


def open_engine_parts(settings: Settings) -> EngineParts:
    """Everything but the models of the engine process."""
    metrics = Metrics(lines_dropped=lines_dropped)
    return EngineParts(settings, SystemClock(), metrics, Observers(metrics, RequestLog()))


def served(models: Models) -> Served:
    """What the engine process tells the others of *models*."""
    return Served(
        version=__version__,
        backend=models.choice.backend,
        device=models.choice.device,
        reason=models.choice.reason,
        slot_count=models.slot_count,
        models=tuple(
            ServedModel(
                card=one.card,
                tokenizer_file=str(one.checkpoint.tokenizer_file),
                cosine_min=one.certificate.cosine_min if one.certificate else None,
                cosine_mean=one.certificate.cosine_mean if one.certificate else None,
                certificate=one.certificate.summary if one.certificate else None,
            )
            for one in models.loaded
        ),
    )


def connect_models(front: Front, *, folder: SharedFolder, name: str, cores: int) -> RemoteModels:
    """The engine process's models for API process *name*; blocks until that has loaded them."""
    what = folder.read_served()
    client = EngineClient(folder, name, served=what, metrics=front.metrics.page)
    pool = ThreadPoolExecutor(cores, thread_name_prefix="trivec-tokenizer")
    embedders = [
        RemoteEmbedder(
            index,
            model.card,
            Tokenizer(
                Path(model.tokenizer_file),
                token_count_max=model.card.token_count_max,
                vocabulary_size=model.card.vocabulary_size,
                pool=pool,
                request_tokens_max=front.settings.http.request_tokens_max,
            ),
            client,
            front.clock,
        )
        for index, model in enumerate(what.models)
    ]
    return RemoteModels(
        choice=Choice(what.backend, what.device, what.reason),
        loaded=[RemoteModel(model.card, _certificate(model)) for model in what.models],
        embedders=by_name(embedders),
        workers=client,
        slot_count=what.slot_count,
        page=lambda: merged_pages({**folder.read_metrics(), name: front.metrics.page()}),
        makes_first_key=name == FIRST_API,
    )


def _certificate(model: ServedModel) -> Certificate | None:
    if model.certificate is None or model.cosine_min is None or model.cosine_mean is None:
        return None
    return Certificate(model.cosine_min, model.cosine_mean, model.certificate)
