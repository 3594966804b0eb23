"""The table of all that is served: path, method, access, handler, and the types on the wire."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from trivec.accounts import Accounts
from trivec.api import admin_schemas, schemas
from trivec.api.access import Access
from trivec.api.admin import USAGE_PARAMETERS, Admin
from trivec.api.answers import Answer
from trivec.api.embeddings import Embeddings
from trivec.api.metering import Meter
from trivec.api.models import Models
from trivec.api.openapi import openapi_document
from trivec.api.probes import Probes, Scrape
from trivec.api.routing import Endpoint, Handler
from trivec.api.shelf import Shelf
from trivec.api.tokenize import Tokenize
from trivec.api.visit import Visit
from trivec.core.health import Health
from trivec.core.ports import Clock, Embedder
from trivec.settings import HttpLimits


@dataclass(frozen=True, slots=True)
class Wiring:
    """What handlers are made of."""

    embedders: Mapping[str, Embedder]
    accounts: Accounts
    meter: Meter
    clock: Clock
    limits: HttpLimits
    health: Callable[[], Health]
    metrics: Callable[[], bytes] | None
    metrics_open: bool


def all_endpoints(wiring: Wiring) -> Sequence[Endpoint]:
    """Everything that is served, the description of it all included."""
    described = [*_api(wiring), *_admin(wiring), *_open(wiring)]
    document = openapi_document(described)

    async def openapi(visit: Visit) -> Answer:
        return Answer(200, (document,))

    return [*described, _get("/openapi.json", openapi, "This description", None)]


def _api(wiring: Wiring) -> list[Endpoint]:
    shelf = Shelf(wiring.embedders)
    models = Models(shelf, wiring.limits)
    common = (shelf, wiring.meter, wiring.limits, wiring.clock)

    def post(path: str, handler: Handler, summary: str, reads: type, answers: type) -> Endpoint:
        return Endpoint(
            "POST", path, Access.EMBED, handler, summary, answers, reads=reads, prefixed=True
        )

    def get(path: str, handler: Handler, summary: str, answers: type) -> Endpoint:
        return Endpoint("GET", path, Access.EMBED, handler, summary, answers, prefixed=True)

    return [
        post(
            "/embeddings",
            Embeddings(*common),
            "Turn texts into vectors",
            schemas.EmbeddingsRequest,
            schemas.EmbeddingsAnswer,
        ),
        post(
            "/tokenize",
            Tokenize(*common),
            "Count tokens without spending any",
            schemas.TokenizeRequest,
            schemas.TokenizeAnswer,
        ),
        get("/models", models.list, "List the models this key may use", schemas.ModelList),
        get("/models/{id:path}", models.show, "Show one model", schemas.Model),
    ]


def _admin(wiring: Wiring) -> list[Endpoint]:
    admin = Admin(wiring.accounts, wiring.limits, Shelf(wiring.embedders))
    key, keys = admin_schemas.KeyShown, admin_schemas.KeyList
    root = "/admin/v1"

    def get(path: str, handler: Handler, summary: str, answers: type) -> Endpoint:
        return Endpoint("GET", root + path, Access.ADMIN, handler, summary, answers)

    def post(
        path: str, handler: Handler, summary: str, answers: type, reads: type | None = None
    ) -> Endpoint:
        return Endpoint("POST", root + path, Access.ADMIN, handler, summary, answers, reads=reads)

    create, rotate = admin_schemas.CreateKeyRequest, admin_schemas.RotateKeyRequest
    return [
        get("/keys", admin.list_keys, "List all keys", keys),
        post("/keys", admin.create_key, "Make a key; the answer shows it once", key, create),
        get("/keys/{id}", admin.show_key, "Show a key, by name or id", key),
        post("/keys/{id}/revoke", admin.revoke_key, "Revoke a key for good", key),
        replace(
            post("/keys/{id}/rotate", admin.rotate_key, "Give a key a second secret", key, rotate),
            must_have_body=False,
        ),
        Endpoint(
            "GET",
            root + "/usage",
            Access.ADMIN,
            admin.usage,
            "Sum the ledger by key, model or day",
            admin_schemas.UsageList,
            query=USAGE_PARAMETERS,
        ),
    ]


def _open(wiring: Wiring) -> list[Endpoint]:
    probes = Probes(wiring.health)
    endpoints = [
        _get("/livez", probes.live, "Whether the process works", schemas.Probe),
        _get("/readyz", probes.ready, "Whether it takes requests", schemas.Probe),
        _get("/health", probes.ready, "The same as /readyz", schemas.Probe),
    ]
    if wiring.metrics is not None:
        access = Access.OPEN if wiring.metrics_open else Access.SCRAPE
        scrape = Scrape(wiring.metrics)
        endpoints.append(
            Endpoint("GET", "/metrics", access, scrape, "Metrics for Prometheus", None)
        )
    return endpoints


def _get(path: str, handler: Handler, summary: str, answers: type | None) -> Endpoint:
    return Endpoint("GET", path, Access.OPEN, handler, summary, answers)
