"""The composition root of several processes: what `assemble` builds, on the two sides of a wire.

The engine process has models and no front; an API process has a front, and its models at a distance.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from trivec import __version__
from trivec.build import Certificate, Choice, Front, Models, by_name
from trivec.core.clock import SystemClock
from trivec.core.ports import Clock, Embedder, Observer
from trivec.core.types import ModelCard
from trivec.ipc.api_end import EngineLink, first_hello
from trivec.ipc.engine_end import EngineEnd
from trivec.ipc.messages import Hello, ModelHello
from trivec.ipc.remote import RemoteEmbedder
from trivec.ipc.wire import WireBounds
from trivec.settings import HttpLimits, Settings
from trivec.telemetry import Metrics, Observers, RequestLog, lines_dropped, merged_pages
from trivec.tokenizer import Tokenizer

WORDS_BYTES = 4  # of a token id, an offset, a float32
HEAD_BYTES = 64
FIRST = 1  # of the processes that speak HTTP; it greets for all


@dataclass(frozen=True, slots=True)
class Backroom:
    """What models need around them in a process that has no front."""

    settings: Settings
    clock: Clock
    metrics: Metrics
    observer: Observer


@dataclass(frozen=True, slots=True)
class DistantModel:
    """A model of the engine process, as an API process knows it."""

    card: ModelCard
    certificate: Certificate | None


@dataclass(frozen=True, slots=True)
class DistantModels:
    """Every model of the engine process; what drives them here is the link to it."""

    choice: Choice
    loaded: Sequence[DistantModel]
    embedders: Mapping[str, Embedder]
    link: EngineLink
    slot_count: int
    page: Callable[[], bytes]
    makes_first_key: bool

    @property
    def workers(self) -> EngineLink:
        return self.link

    @property
    def troubles(self) -> tuple[str, ...]:
        return self.link.troubles


def open_backroom(settings: Settings) -> Backroom:
    """Everything but the models of the engine process."""
    metrics = Metrics(lines_dropped=lines_dropped)
    return Backroom(settings, SystemClock(), metrics, Observers(metrics, RequestLog()))


def engine_end(room: Backroom, models: Models) -> EngineEnd:
    """What answers API processes that call for *models*."""
    settings, choice = room.settings, models.choice
    served = [(one, models.embedders[one.card.id]) for one in models.loaded]
    hello = Hello(
        version=__version__,
        backend=choice.backend,
        device=choice.device,
        reason=choice.reason,
        slot_count=models.slot_count,
        models=tuple(
            ModelHello(
                card=one.card,
                tokenizer_file=str(one.checkpoint.tokenizer_file),
                cosine_min=one.certificate.cosine_min if one.certificate else None,
                cosine_mean=one.certificate.cosine_mean if one.certificate else None,
                certificate=one.certificate.summary if one.certificate else None,
            )
            for one, _ in served
        ),
    )
    return EngineEnd(
        hello,
        [embedder for _, embedder in served],
        bounds=wire_bounds(settings.http, [one.card for one, _ in served]),
        api_process_count=settings.api_processes,
        page=room.metrics.page,
    )


def call_engine(front: Front, *, path: Path, number: int, cores: int) -> DistantModels:
    """The models of the engine process behind *path*; blocks until it has loaded them.

    *number* is this process's among those that speak HTTP; the first makes the first key.
    """
    name = api_name(number)
    limits = front.settings.http
    hello = asyncio.run(first_hello(path, bounds=wire_bounds(limits, ())))
    cards = [model.card for model in hello.models]
    link = EngineLink(
        path, name, hello=hello, bounds=wire_bounds(limits, cards), page=front.metrics.page
    )
    pool = ThreadPoolExecutor(cores, thread_name_prefix="trivec-tokenizer")
    embedders = [
        RemoteEmbedder(
            index,
            model,
            tokenizer=Tokenizer(
                Path(model.tokenizer_file),
                token_count_max=model.card.token_count_max,
                vocabulary_size=model.card.vocabulary_size,
                pool=pool,
                request_tokens_max=limits.request_tokens_max,
            ),
            link=link,
            clock=front.clock,
        )
        for index, model in enumerate(hello.models)
    ]
    return DistantModels(
        choice=Choice(hello.backend, hello.device, hello.reason),
        loaded=[DistantModel(model.card, _certificate(model)) for model in hello.models],
        embedders=by_name(embedders),
        link=link,
        slot_count=hello.slot_count,
        page=lambda: merged_pages({name: front.metrics.page(), **link.others}),
        makes_first_key=number == FIRST,
    )


def api_name(number: int) -> str:
    """What a process that speaks HTTP is called in the log and in metrics."""
    return f"api-{number}"


def wire_bounds(limits: HttpLimits, cards: Sequence[ModelCard]) -> WireBounds:
    """The largest request and the largest answer that the limits of HTTP let through.

    An answer's numbers are estimated as text or base64, which is longer than they are; dense rows
    cross the wire whether or not they were asked for.
    """
    dimensions = max((card.dimensions for card in cards), default=0)
    numbers = limits.request_tokens_max + limits.inputs_max + 1
    rows_bytes = limits.inputs_max * WORDS_BYTES * (dimensions + 2)
    return WireBounds(
        ask_bytes_max=HEAD_BYTES + WORDS_BYTES * numbers,
        reply_bytes_max=HEAD_BYTES + limits.answer_bytes_max + rows_bytes,
    )


def _certificate(model: ModelHello) -> Certificate | None:
    if model.certificate is None or model.cosine_min is None or model.cosine_mean is None:
        return None
    return Certificate(model.cosine_min, model.cosine_mean, model.certificate)
