"""The composition root of several processes: what `build` makes, on the two sides of a socket.

The engine process has models and no HTTP; an API process has HTTP, and its models at a distance.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from trivec import __version__
from trivec.build import Choice, Models, ServerParts, by_name
from trivec.core.clock import SystemClock
from trivec.core.ports import Clock, Observer
from trivec.ipc.client import EngineClient, RemoteEmbedder
from trivec.ipc.folder import Served, ServedModel, SharedFolder
from trivec.settings import Settings
from trivec.telemetry import Metrics, Observers, RequestLog, lines_dropped, merged_pages
from trivec.tokenizer import Tokenizer

ENGINE = "engine"  # the engine process's name
FIRST_API = "api-1"  # makes the first key, and greets for all


@dataclass(frozen=True, slots=True)
class EngineParts:
    """What models need around them in a process without HTTP."""

    settings: Settings
    clock: Clock
    metrics: Metrics
    observer: Observer


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
                one.card,
                str(one.checkpoint.tokenizer_file),
                one.certificate,
                one.checkpoint.config.token_type_count,
            )
            for one in models.loaded
        ),
    )


def connect_models(parts: ServerParts, *, folder: SharedFolder, name: str, cores: int) -> Models:
    """The engine process's models for API process *name*; blocks until that has loaded them."""
    what = folder.read_served()
    client = EngineClient(folder, name, served=what, metrics=parts.metrics.page)

    def metrics_page() -> bytes:
        """Of all processes. An engine process that is away is not ready, whatever its last page says."""
        pages = dict(folder.read_metrics())
        if client.problems:
            pages.pop(ENGINE, None)
        return merged_pages({**pages, name: parts.metrics.page()})

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
                request_tokens_max=parts.settings.http.request_tokens_max,
                token_type_count=model.token_type_count,
                include_prompt=model.card.include_prompt,
            ),
            client,
        )
        for index, model in enumerate(what.models)
    ]
    return Models(
        choice=Choice(what.backend, what.device, what.reason),
        cards=[model.card for model in what.models],
        certificates={
            model.card.id: model.certificate
            for model in what.models
            if model.certificate is not None
        },
        embedders=by_name(embedders),
        workers=client,
        slot_count=what.slot_count,
        metrics_page=metrics_page,
        problems=lambda: client.problems,
        makes_first_key=name == FIRST_API,
    )
