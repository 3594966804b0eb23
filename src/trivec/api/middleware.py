"""The two rings around the router: one names and counts every request, one answers its failures."""

import logging
import traceback
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from trivec.api.bodies import drop_rest_of_body
from trivec.api.errors import CLIENT_GONE, answer_to, problem_of, status_of
from trivec.api.headers import answer_headers
from trivec.api.memory import ByteBudget
from trivec.api.presence import ClientGone
from trivec.api.sending import send_answer
from trivec.api.visit import VISIT, Visit, open_visit
from trivec.core.errors import EngineFault, ServiceError, is_panic
from trivec.core.events import RequestServed
from trivec.core.health import Health
from trivec.core.ports import Clock, Observer
from trivec.settings import HttpLimits

_log = logging.getLogger(__name__)


class Visits:
    """Opens a visit, puts its headers on the answer, tells the observer how it ended, and reads
    what a refusal left of the body.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        observer: Observer,
        clock: Clock,
        limits: HttpLimits,
        health: Callable[[], Health],
        memory: ByteBudget,
    ) -> None:
        self._app = app
        self._observer = observer
        self._clock = clock
        self._limits = limits
        self._health = health
        self._memory = memory

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await _no_http(scope, receive, send)
            return
        visit = scope[VISIT] = open_visit(
            scope,
            receive,
            self._memory.open(),
            now_s=self._clock.now_s(),
            request_s_max=self._limits.request_s_max,
        )

        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                visit.status = message["status"]
                closes = visit.waits_to_send or self._health().phase in ("draining", "stopped")
                elapsed_s = self._clock.now_s() - visit.started_s
                message["headers"] += answer_headers(visit, elapsed_s=elapsed_s, closes=closes)
            else:
                visit.answer_bytes += len(message["body"])
            await send(message)

        try:
            await self._app(scope, receive, send_named)
        finally:
            visit.held.close()
            self._observer.observe(self._served(visit))
        if visit.status is not None:
            await drop_rest_of_body(visit, self._limits)

    def _served(self, visit: Visit) -> RequestServed:
        status = CLIENT_GONE if visit.status is None else visit.status
        return RequestServed(
            request_id=visit.request_id,
            client_request_id=visit.client_request_id,
            method=visit.method,
            route=visit.route,
            status=status,
            code=visit.code,
            key_id=visit.caller.key_id if visit.caller is not None else None,
            model=visit.model,
            input_count=visit.input_count,
            token_count=visit.tokens_served(status),
            request_bytes=visit.request_bytes,
            answer_bytes=visit.answer_bytes,
            duration_s=self._clock.now_s() - visit.started_s,
            tokenize_s=visit.timings.tokenize_s,
            queue_s=visit.timings.queue_s,
            compute_s=visit.timings.compute_s,
            encode_s=visit.timings.encode_s,
            traceparent=visit.traceparent,
            message=visit.message,
        )


class Failures:
    """Turns whatever was raised into an answer, once; the outermost loop of a request."""

    def __init__(self, app: ASGIApp, *, limits: HttpLimits) -> None:
        self._app = app
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        visit: Visit = scope[VISIT]
        try:
            await self._app(scope, receive, send)
        except ClientGone:
            visit.code = "client_gone"
        except ServiceError as error:
            await self._answer(visit, error, send)
        except BaseException as error:
            if not isinstance(error, Exception) and not is_panic(error):
                raise
            await self._answer(visit, EngineFault(_where_raised(error)), send)

    async def _answer(self, visit: Visit, failure: ServiceError, send: Send) -> None:
        if isinstance(failure, EngineFault):
            _log.error("request %s failed: %s", visit.request_id, failure)
        problem = problem_of(failure, request_id=visit.request_id)
        visit.code = problem.code or problem.type
        if status_of(failure) < 500:
            visit.message = problem.message
        if visit.status is None:  # else the connection is cut: half an answer must not look whole
            answer = answer_to(failure, request_id=visit.request_id)
            await send_answer(answer, send, self._limits, method=visit.method)


def _where_raised(error: BaseException) -> str:
    """Not what it says: a message of a library can hold a client's text."""
    frames = "".join(traceback.format_tb(error.__traceback__))
    return f"{type(error).__name__}\n{frames}"


async def _no_http(scope: Scope, receive: Receive, send: Send) -> None:
    """Nothing starts or stops with the app, and no web sockets are served."""
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.close", "code": 1003})
        return
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return
