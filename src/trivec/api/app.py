"""ASGI app: every route, mounted under its prefixes, behind the middleware stack."""

from collections.abc import Callable, Mapping
from dataclasses import replace

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp

from trivec.accounts import Accounts
from trivec.api import admin, health, openai
from trivec.api.context import AppState
from trivec.api.memory import ByteBudget
from trivec.api.middleware import Endpoint, ErrorHandler, RequestLog, UnpaidRate
from trivec.api.openapi import Operation, openapi_document
from trivec.api.responses import ApiResponse
from trivec.core.health import Health
from trivec.core.ports import Clock, Embedder, Observer
from trivec.settings import HttpLimits

PREFIXES = ("/v1", "/openai/v1", "/v3/openai")  # the first is matched first


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
) -> ASGIApp:
    """The whole HTTP surface as one plain ASGI app, for granian, uvicorn or Ray Serve.

    *embedders* maps every served id and alias; empty while loading. *metrics* None: not served.
    *memory* is shared by the apps of one process. The app starts and owns nothing.
    """
    state = AppState(
        embedders=embedders,
        accounts=accounts,
        observer=observer,
        clock=clock,
        limits=limits,
        health=health,
        metrics=metrics,
        memory=memory or ByteBudget(connections_max=limits.connections_max),
    )
    operations = all_operations(has_metrics=metrics is not None, metrics_open=metrics_open)
    document = openapi_document(operations)

    async def openapi(request: Request) -> Response:
        return ApiResponse([document])

    operations.append(Operation("GET", "/openapi.json", openapi, "This description", None))
    unpaid = UnpaidRate(limits.unpaid_requests_per_minute)
    routes = [Route(one.path, Endpoint(one, unpaid), methods=[one.method]) for one in operations]
    return RequestLog(ErrorHandler(Router(routes, redirect_slashes=False)), state)


def all_operations(*, has_metrics: bool, metrics_open: bool) -> list[Operation]:
    """Every operation that is served and described. A new face adds its own list here.

    The prefixes are spelt out rather than mounted: a request then meets one router instead of two,
    and its route's path is whole in logs and metrics.
    """
    operations = [
        replace(one, path=prefix + one.path) for prefix in PREFIXES for one in openai.OPERATIONS
    ]
    operations += [*admin.OPERATIONS, *health.OPERATIONS]
    if has_metrics:
        metrics = health.METRICS
        operations.append(replace(metrics, scope=None) if metrics_open else metrics)
    return operations
