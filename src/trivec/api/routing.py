"""From declared endpoints to a router: one place a path, which knows its methods and its access."""

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from starlette.routing import Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from trivec.api.access import Access, Gate
from trivec.api.answers import Answer
from trivec.api.metering import Meter
from trivec.api.patience import Patience
from trivec.api.sending import send_answer
from trivec.api.visit import VISIT, Visit
from trivec.core.errors import MethodNotAllowed, RouteUnknown
from trivec.core.ports import Clock
from trivec.settings import HttpLimits

PREFIXES = ("/v1", "/openai/v1", "/v3/openai")

Handler: TypeAlias = Callable[[Visit], Awaitable[Answer]]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One operation: where it is, who may call it, what it reads and what it answers."""

    method: str
    path: str  # relative to each prefix where `prefixed`
    access: Access
    handler: Handler
    summary: str
    answers: type | None  # the structure of its JSON answer; None: not JSON of ours
    reads: type | None = None  # the structure of its JSON body
    must_have_body: bool = True  # where it reads one
    prefixed: bool = False
    query: Sequence[str] = ()

    @property
    def paths(self) -> Sequence[str]:
        return [prefix + self.path for prefix in PREFIXES] if self.prefixed else [self.path]


@dataclass(frozen=True, slots=True)
class Doors:
    """What every place needs to let a request in and an answer out."""

    gate: Gate
    meter: Meter
    clock: Clock
    limits: HttpLimits


class Place:
    """One path: picks the endpoint of the method, checks access, bounds the time, sends."""

    def __init__(self, path: str, endpoints: Iterable[Endpoint], doors: Doors) -> None:
        self.endpoints = {endpoint.method: endpoint for endpoint in endpoints}
        self._route = path.replace(":path}", "}")
        self._doors = doors
        if "GET" in self.endpoints:
            self.endpoints["HEAD"] = self.endpoints["GET"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        visit: Visit = scope[VISIT]
        visit.route = self._route
        visit.path_params = scope.get("path_params", {})
        endpoint = self.endpoints.get(visit.method)
        if endpoint is None:
            raise MethodNotAllowed(method=visit.method, allowed=tuple(sorted(self.endpoints)))
        answer = await self._answer(endpoint, visit)
        await send_answer(answer, send, self._doors.limits, method=visit.method)

    async def _answer(self, endpoint: Endpoint, visit: Visit) -> Answer:
        if endpoint.access is Access.OPEN:
            return await endpoint.handler(visit)
        visit.caller = await self._doors.gate.identify(visit)
        if not endpoint.access.is_recorded:
            visit.caller.require(endpoint.access.scope)
            return await endpoint.handler(visit)
        async with self._doors.meter.row(visit):
            with Patience(visit, self._doors.limits, self._doors.clock):
                visit.caller.require(endpoint.access.scope)
                return await endpoint.handler(visit)


class Paths:
    """Finds the place of a path: by one look-up where it is fixed, by the router where it is not."""

    def __init__(self, places: Mapping[str, Place], router: ASGIApp) -> None:
        self._fixed = {path: place for path, place in places.items() if "{" not in path}
        self._router = router

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        place = self._fixed.get(scope["path"])  # with a root path it is the router that cuts it
        await (self._router if place is None else place)(scope, receive, send)


def build_router(endpoints: Sequence[Endpoint], doors: Doors) -> ASGIApp:
    """A router that raises `RouteUnknown` and `MethodNotAllowed` instead of answering them."""
    by_path: dict[str, list[Endpoint]] = {}
    for endpoint in endpoints:
        for path in endpoint.paths:
            by_path.setdefault(path, []).append(endpoint)
    places = {path: Place(path, found, doors) for path, found in by_path.items()}
    routes = [Route(path, place) for path, place in places.items()]
    return Paths(places, Router(routes, redirect_slashes=False, default=_nowhere))


async def _nowhere(scope: Scope, receive: Receive, send: Send) -> None:
    raise RouteUnknown(
        f"Nothing is served at this path with {scope[VISIT].method}. "
        "The API is under /v1, /openai/v1 and /v3/openai; /openapi.json describes it."
    )
