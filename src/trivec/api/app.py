"""ASGI app: every route, under each of its prefixes, behind the middleware."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp

from trivec.accounts import Accounts
from trivec.api import admin, cohere, health, ollama, openai, rerank, tei
from trivec.api.auth import Endpoint, UnpaidRate
from trivec.api.batches import OPERATIONS as BATCH_OPERATIONS
from trivec.api.context import AppState, RequestContext
from trivec.api.memory import ByteBudget
from trivec.api.middleware import RequestMiddleware
from trivec.api.openapi import Operation, openapi_document
from trivec.core.health import Health
from trivec.core.ports import Clock, Embedder, Observer
from trivec.jobs.batches import Batches
from trivec.settings import HttpLimits

PREFIXES = ("/v1", "/openai/v1", "/v3/openai")  # the first is matched first


def prefixed(operations: Sequence[Operation]) -> list[Operation]:
    """*operations* under each of `PREFIXES`.

    The prefixes are spelt out rather than mounted: a request then meets one router instead of two,
    and its route's path is whole in logs and metrics.
    """
    return [
        replace(one, path=prefix + one.path, prefix=prefix)
        for prefix in PREFIXES
        for one in operations
    ]


# The APIs beside OpenAI's embeddings, which can be left out. Of two with the same route the first one
# has it.
FACES: Mapping[str, Sequence[Operation]] = {
    "batches": prefixed(BATCH_OPERATIONS),
    "cohere": cohere.OPERATIONS,
    "tei": tei.OPERATIONS,
    "vllm": rerank.VLLM_OPERATIONS,
    "ollama": ollama.OPERATIONS,
}
CORS_HEADERS = (  # of an answer, that a page's scripts may read
    *("x-request-id", "openai-processing-ms", "server-timing", "retry-after", "retry-after-ms"),
    *(
        f"x-ratelimit-{what}-{kind}"
        for what in ("limit", "remaining", "reset")
        for kind in ("requests", "tokens")
    ),
)


def build_app(
    *,
    embedders: Mapping[str, Embedder],
    accounts: Accounts,
    observer: Observer,
    clock: Clock,
    limits: HttpLimits,
    health: Callable[[], Health],
    metrics: Callable[[], bytes] | None,
    metrics_open: bool,
    memory: ByteBudget | None = None,
    batches: Batches | None = None,
    faces: Collection[str] = FACES.keys(),
    operations: Sequence[Operation] = (),
    pages: Sequence[Operation] = (),
) -> ASGIApp:
    """The whole HTTP surface as one plain ASGI app, for granian, uvicorn or Ray Serve.

    *embedders* maps every served id and alias; empty while loading. *metrics* None: not served.
    *memory* is shared by the apps of one process. *batches* None: that face is not served. *faces*: of `FACES`, those that are served.
    *operations* are served beside our own, and *pages* too, undescribed: for browsers, where a face
    has their path. The app starts and owns nothing.
    """
    memory = memory or ByteBudget(connections_max=limits.connections_max)
    state = AppState(embedders, accounts, observer, clock, limits, health, metrics, memory, batches)
    faces = [name for name in faces if name != "batches" or batches is not None]
    known = all_operations(metrics is not None, metrics_open=metrics_open, faces=faces)
    served = [*known, *operations]
    document = openapi_document(served)

    async def openapi(_: RequestContext) -> Response:
        return Response(document, media_type="application/json")

    served.append(Operation("GET", "/openapi.json", openapi, None, None))
    taken = {one.path: one for one in served if one.method == "GET"}
    pages = [for_browsers(one, taken[one.path]) if one.path in taken else one for one in pages]
    of_pages = {one.path for one in pages}
    served = [one for one in served if one.method != "GET" or one.path not in of_pages] + pages
    unpaid = UnpaidRate(limits.unpaid_requests_per_minute)
    routes = [Route(one.path, Endpoint(one, unpaid), methods=[one.method]) for one in served]
    app: ASGIApp = RequestMiddleware(Router(routes, redirect_slashes=False), state)
    if limits.cors_origins:  # outermost: a page may read refusals, too, and a preflight has no key
        app = CORSMiddleware(
            app,
            allow_origins=limits.cors_origins,
            allow_methods=("GET", "POST", "DELETE"),
            allow_headers=("*",),
            expose_headers=CORS_HEADERS,
        )
    return app


def for_browsers(page: Operation, other: Operation) -> Operation:
    """*page* where HTML is asked for, else *other*: people and Ollama's clients share `/`."""

    async def choose(context: RequestContext) -> Response:
        wants_page = b"text/html" in context.headers.get(b"accept", b"")
        return await (page if wants_page else other).handler(context)

    return replace(page, handler=choose)


def all_operations(
    has_metrics: bool, *, metrics_open: bool, faces: Collection[str] = FACES.keys()
) -> list[Operation]:
    """Every operation that is served and described. Another API adds its own list here."""
    operations = prefixed([*openai.OPERATIONS, *rerank.OPERATIONS])
    operations += [*admin.OPERATIONS, *health.OPERATIONS]
    if has_metrics:
        operations.append(replace(health.METRICS, scope=None) if metrics_open else health.METRICS)
    # Clients of Jina that are given no prefix ask for /rerank, whichever faces are served.
    chosen = [of_face for name, of_face in FACES.items() if name in faces]
    for of_face in (*chosen, rerank.OPERATIONS):
        taken = {(one.method, one.path) for one in operations}
        operations += [one for one in of_face if (one.method, one.path) not in taken]
    return operations
