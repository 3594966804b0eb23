"""`/livez`, `/readyz`, `/health` and `/metrics`: results that others made; nothing is computed."""

import asyncio
from collections.abc import Callable

from trivec.api.answers import Answer, json_answer
from trivec.api.schemas import Probe
from trivec.api.visit import Visit
from trivec.core.health import Health

PROMETHEUS = b"text/plain; version=0.0.4; charset=utf-8"
NO_STORE = ((b"cache-control", b"no-store"),)


class Probes:
    """Each answers 200, or 503 with the reason."""

    def __init__(self, health: Callable[[], Health]) -> None:
        self._health = health

    async def live(self, visit: Visit) -> Answer:
        health = self._health()
        return _probe(health, passes=health.alive)

    async def ready(self, visit: Visit) -> Answer:
        health = self._health()
        return _probe(health, passes=health.ready)


class Scrape:
    """The Prometheus page, as telemetry prints it; off the event loop, for it is long to print."""

    def __init__(self, page: Callable[[], bytes]) -> None:
        self._page = page

    async def __call__(self, visit: Visit) -> Answer:
        page = await asyncio.to_thread(self._page)
        return Answer(200, (page,), media_type=PROMETHEUS)


def _probe(health: Health, *, passes: bool) -> Answer:
    probe = Probe("ok" if passes else "unavailable", health.phase, health.reason)
    return json_answer(probe, status=200 if passes else 503, headers=NO_STORE)
