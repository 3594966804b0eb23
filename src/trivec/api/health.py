"""Probes and the metrics page: what is known of the process already, with nothing computed."""

import asyncio

from starlette.responses import Response

from trivec.accounts import Scope
from trivec.api.context import RequestContext
from trivec.api.openapi import Operation
from trivec.api.responses import NO_STORE, json_response
from trivec.api.schemas import Probe
from trivec.core.health import Health

PROMETHEUS = {"content-type": "text/plain; version=0.0.4; charset=utf-8"}


async def livez(context: RequestContext) -> Response:
    """Whether the process works."""
    health = context.app.health()
    return _probe(health, passes=health.alive)


async def readyz(context: RequestContext) -> Response:
    """Whether it takes requests."""
    health = context.app.health()
    return _probe(health, passes=health.ready)


def _probe(health: Health, *, passes: bool) -> Response:
    probe = Probe("ok" if passes else "unavailable", health.phase, health.reason)
    return json_response(probe, status=200 if passes else 503, headers=NO_STORE)


async def metrics(context: RequestContext) -> Response:
    """Metrics for Prometheus."""
    assert context.app.metrics is not None, "the route exists only where there are metrics"
    page = await asyncio.to_thread(context.app.metrics)  # it is long to print
    return Response(page, headers=PROMETHEUS)


OPERATIONS = (
    Operation("GET", "/livez", livez, None, Probe),
    Operation("GET", "/readyz", readyz, None, Probe),
    Operation("GET", "/health", readyz, None, Probe),
)
# Without a row in the ledger, for it is asked for all day.
METRICS = Operation("GET", "/metrics", metrics, Scope.ADMIN, None, is_metered=False)
