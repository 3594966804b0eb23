"""Probes and the metrics page: what others found out; nothing is computed here."""

import asyncio

from starlette.requests import Request
from starlette.responses import Response

from trivec.accounts import Scope
from trivec.api.context import CONTEXT, RequestContext
from trivec.api.openapi import Operation
from trivec.api.responses import NO_STORE, ApiResponse, json_response
from trivec.api.schemas import Probe
from trivec.core.health import Health

PROMETHEUS = b"text/plain; version=0.0.4; charset=utf-8"


async def livez(request: Request) -> Response:
    """`GET /livez`: 200, or 503 with the reason."""
    context: RequestContext = request.scope[CONTEXT]
    health = context.app.health()
    return _probe(health, passes=health.alive)


async def readyz(request: Request) -> Response:
    """`GET /readyz` and `GET /health`: 200, or 503 with the reason."""
    context: RequestContext = request.scope[CONTEXT]
    health = context.app.health()
    return _probe(health, passes=health.ready)


async def metrics(request: Request) -> Response:
    """`GET /metrics`: the Prometheus page, off the event loop, for it is long to print."""
    context: RequestContext = request.scope[CONTEXT]
    assert context.app.metrics is not None, "the route exists only where there are metrics"
    page = await asyncio.to_thread(context.app.metrics)
    return ApiResponse([page], media_type=PROMETHEUS)


def _probe(health: Health, *, passes: bool) -> Response:
    probe = Probe("ok" if passes else "unavailable", health.phase, health.reason)
    return json_response(probe, status=200 if passes else 503, headers=NO_STORE)


OPERATIONS = (
    Operation("GET", "/livez", livez, "Whether the process works", Probe),
    Operation("GET", "/readyz", readyz, "Whether it takes requests", Probe),
    Operation("GET", "/health", readyz, "The same as /readyz", Probe),
)
METRICS = Operation(
    "GET",
    "/metrics",
    metrics,
    "Metrics for Prometheus",
    None,
    scope=Scope.ADMIN,
    is_metered=False,  # it comes all day
)
