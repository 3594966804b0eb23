"""The app: routes behind two rings of middleware, as plain ASGI. It starts and owns nothing."""

from collections.abc import Callable, Mapping

from starlette.types import ASGIApp

from trivec.accounts import Accounts
from trivec.api.access import Gate
from trivec.api.endpoints import Wiring, all_endpoints
from trivec.api.memory import ByteBudget
from trivec.api.metering import Meter
from trivec.api.middleware import Failures, Visits
from trivec.api.routing import Doors, build_router
from trivec.core.health import Health
from trivec.core.ports import Clock, Embedder, Observer
from trivec.settings import HttpLimits


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

    *embedders* maps every served id and alias; empty while loading. *metrics* None: not served. *memory* is
    shared by the apps of one process.
    """
    meter = Meter(accounts, clock, limits)
    wiring = Wiring(
        embedders=embedders,
        accounts=accounts,
        meter=meter,
        clock=clock,
        limits=limits,
        health=health,
        metrics=metrics,
        metrics_open=metrics_open,
    )
    doors = Doors(
        gate=Gate(accounts, health, serves_models=bool(embedders)),
        meter=meter,
        clock=clock,
        limits=limits,
    )
    router = build_router(all_endpoints(wiring), doors)
    return Visits(
        Failures(router, limits=limits),
        observer=observer,
        clock=clock,
        limits=limits,
        health=health,
        memory=memory or ByteBudget(connections_max=limits.connections_max),
    )
