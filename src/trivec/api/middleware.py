"""Middleware stack, as plain ASGI: request id and log, errors, then each endpoint's key and usage."""

import logging
import traceback
from math import ceil

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from trivec.accounts import Caller, RateLimitState, RequestMeta, RequestUsage
from trivec.api.body import drop_rest_of_body
from trivec.api.context import CONTEXT, AppState, RequestContext
from trivec.api.errors import CLIENT_GONE, error_response, problem_of, status_of
from trivec.api.openapi import Operation
from trivec.api.responses import HeaderList
from trivec.api.timeout import ClientDisconnected, RequestTimeout
from trivec.core.errors import (
    Draining,
    EngineFault,
    Loading,
    MethodNotAllowed,
    RateLimitExceeded,
    RouteUnknown,
    ServiceError,
    is_panic,
)
from trivec.core.events import RequestServed

CLIENT_REQUEST_ID_CHARS_MAX = 512
TRACEPARENT_CHARS_MAX = 128
LOADING_RETRY_S = 5.0
DRAINING_RETRY_S = 1.0  # another replica, or this one started again
OUR_FAULT_FROM = 500
TOO_MANY = 429  # what waits for a rate limit is bounded by it

_log = logging.getLogger(__name__)


class RequestLog:
    """Opens the context, adds headers to the answer, tells the observer how the request ended, and
    reads what a refusal left of its body.
    """

    def __init__(self, app: ASGIApp, state: AppState) -> None:
        self._app = app
        self._state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # Starlette's router answers lifespan and refuses web sockets
            await self._app(scope, receive, send)
            return
        app = self._state
        context = scope[CONTEXT] = RequestContext.of(scope, receive, app)
        scope["app"] = app  # so that the router raises `HTTPException` where it finds no route

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                context.status = message["status"]
                message["headers"] += answer_headers(context)
            else:
                context.answer_bytes += len(message["body"])
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        finally:
            context.memory.close()
            status = CLIENT_GONE if context.status is None else context.status
            app.observer.observe(
                RequestServed(
                    request_id=context.request_id,
                    client_request_id=context.header_for_log(
                        b"x-client-request-id", chars_max=CLIENT_REQUEST_ID_CHARS_MAX
                    ),
                    method=context.method,
                    route=scope["route"].path_format if "route" in scope else "other",
                    status=status,
                    code=context.error_code,
                    key_id=context.caller.key_id if context.caller is not None else None,
                    model=context.model,
                    input_count=context.input_count,
                    token_count=context.token_count if status < 400 else 0,
                    request_bytes=context.request_bytes,
                    answer_bytes=context.answer_bytes,
                    duration_s=app.clock.now_s() - context.started_s,
                    tokenize_s=context.tokenize_s,
                    queue_s=context.queue_s,
                    compute_s=context.compute_s,
                    encode_s=context.encode_s,
                    traceparent=context.header_for_log(
                        b"traceparent", chars_max=TRACEPARENT_CHARS_MAX
                    ),
                    message=context.error_message,
                )
            )
        if context.status is not None:
            await drop_rest_of_body(context)


class ErrorHandler:
    """Turns whatever was raised into an answer, once; the outermost loop of a request."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._app(scope, receive, send)
        except ClientDisconnected:
            scope[CONTEXT].error_code = "client_gone"
        except ServiceError as error:
            await self._answer(error, scope, receive, send)
        except HTTPException as refused:  # the router's own
            await self._answer(_no_route(refused, scope), scope, receive, send)
        except BaseException as error:
            if scope["type"] != "http" or not (isinstance(error, Exception) or is_panic(error)):
                raise
            # Not what it says: a message of a library can hold a client's text.
            frames = "".join(traceback.format_tb(error.__traceback__))
            fault = EngineFault(f"{type(error).__name__}\n{frames}")
            await self._answer(fault, scope, receive, send)

    async def _answer(
        self, error: ServiceError, scope: Scope, receive: Receive, send: Send
    ) -> None:
        context: RequestContext = scope[CONTEXT]
        if isinstance(error, EngineFault):
            _log.error("request %s failed: %s", context.request_id, error)
        problem = problem_of(error, request_id=context.request_id)
        context.error_code = problem.code or problem.type
        if status_of(error) < OUR_FAULT_FROM:
            context.error_message = problem.message
        if context.status is None:  # else the connection is cut: half an answer must not look whole
            await error_response(error, problem)(scope, receive, send)


class Endpoint:
    """ASGI app of one operation: asks for its key, bounds its time, writes its usage, answers."""

    def __init__(self, operation: Operation, unpaid: "UnpaidRate") -> None:
        self._operation = operation
        self._unpaid = unpaid

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        context: RequestContext = scope[CONTEXT]
        request, operation = Request(scope, receive, send), self._operation
        if operation.scope is None:
            response = await operation.handler(request)
        else:
            context.caller = await identify(context)
            if operation.is_metered:
                response = await self._metered(request, context, context.caller)
            else:
                context.caller.require(operation.scope)
                response = await operation.handler(request)
        await response(scope, receive, send)

    async def _metered(self, request: Request, context: RequestContext, caller: Caller) -> Response:
        """The handler's response, once the request's row in the ledger is written.

        Every request of a known key has a row, whatever it came to. One that fails costs no tokens;
        one that ends before it was reserved, as with a malformed body, costs its key nothing. Raises
        `StoreUnavailable` rather than lose a success. Cancelling it while it writes does not undo
        the row: the accounts room sees to that.
        """
        app = context.app
        now_s = app.clock.now_s()
        try:
            self._unpaid.check(caller, now_s=now_s)
            with RequestTimeout(
                context.receive,
                left_s=context.deadline_s - now_s,
                request_s_max=context.deadline_s - context.started_s,
                body_s_max=app.limits.body_s_max,
            ) as context.timeout:
                assert self._operation.scope is not None, "a metered operation asks for a key"
                caller.require(self._operation.scope)
                response = await self._operation.handler(request)
        except BaseException as error:
            await self._write_usage(context, caller, status_of(error))
            raise
        finally:
            context.timeout = None
        await self._write_usage(context, caller, 200)
        return response

    async def _write_usage(self, context: RequestContext, caller: Caller, status: int) -> None:
        app, reservation = context.app, context.reservation
        token_count = context.token_count if status < 400 else 0
        if reservation is None:
            reservation = app.accounts.reserve(
                caller, RequestMeta(request_id=context.request_id, model=context.model)
            )
        now_s = app.clock.now_s()
        if token_count == 0 and status < OUR_FAULT_FROM and status != TOO_MANY:
            self._unpaid.charge(caller, now_s=now_s)
        await reservation.close(
            RequestUsage(
                status=status,
                input_count=context.input_count,
                token_count=token_count,
                duration_s=now_s - context.started_s,
                user=context.user,
            )
        )
        context.rate_limits = reservation.state


class UnpaidRate:
    """Rate limit of the requests that cost no tokens: so many a minute for each key, in this process.

    A request is charged when it is over, and refused while the key's minute is used up: before that
    nobody knows what it costs. The burst is one minute's worth. Keys are few, so none is dropped.
    """

    def __init__(self, requests_per_minute: int) -> None:
        self._limit = requests_per_minute
        self._debts: dict[str, tuple[float, float]] = {}  # by key: requests owed, as of when

    def check(self, caller: Caller, *, now_s: float) -> None:
        """Raise `RateLimitExceeded` while *caller* has used up its minute."""
        excess = self._debt(caller, now_s) + 1 - self._limit
        if excess > 0:
            raise RateLimitExceeded(
                kind="requests",
                limit=self._limit,
                requested=1,
                retry_after_s=excess * 60 / self._limit,
                what="requests that cost no tokens",
            )

    def charge(self, caller: Caller, *, now_s: float) -> None:
        self._debts[caller.key_id] = (min(self._debt(caller, now_s) + 1, self._limit), now_s)

    def _debt(self, caller: Caller, now_s: float) -> float:
        debt, at_s = self._debts.get(caller.key_id, (0.0, now_s))
        return max(0.0, debt - (now_s - at_s) * self._limit / 60)


async def identify(context: RequestContext) -> Caller:
    """The caller. Raises `Loading`, `Draining`, `KeyMissing`, `KeyInvalid`.

    A process that is still loading or that has stopped refuses first: it is the cheapest.
    """
    phase = context.app.health().phase
    if phase == "loading" or not context.app.embedders:
        raise Loading(
            "The model is still loading. Please try again shortly.", retry_after_s=LOADING_RETRY_S
        )
    if phase == "stopped":
        raise Draining(
            "This server is about to stop. Please try again.", retry_after_s=DRAINING_RETRY_S
        )
    scheme, _, credential = (context.header(b"authorization") or "").strip().partition(" ")
    return await context.app.accounts.identify(
        credential.strip() if scheme.lower() == "bearer" else None
    )


def answer_headers(context: RequestContext) -> HeaderList:
    """The headers of every answer: its id, where its time went, what is left of the rate limits."""
    app, state = context.app, context.rate_limits
    elapsed_ms = round((app.clock.now_s() - context.started_s) * 1000)
    headers: HeaderList = [
        (b"x-request-id", context.request_id.encode()),
        (b"openai-processing-ms", b"%d" % elapsed_ms),
        (
            b"server-timing",
            b"tokenize;dur=%.3f, queue;dur=%.3f, compute;dur=%.3f, encode;dur=%.3f"
            % (
                context.tokenize_s * 1e3,
                context.queue_s * 1e3,
                context.compute_s * 1e3,
                context.encode_s * 1e3,
            ),
        ),
    ]
    if state is not None:
        headers += ratelimit_headers(state)
    if context.waits_for_100 or app.health().phase in ("draining", "stopped"):
        headers.append((b"connection", b"close"))
    return headers


def ratelimit_headers(state: RateLimitState) -> HeaderList:
    """OpenAI's six, of which those without a limit are left out."""
    headers: HeaderList = []
    for kind, limit, remaining, reset_s in (
        (b"requests", state.limit_requests, state.remaining_requests, state.reset_requests_s),
        (b"tokens", state.limit_tokens, state.remaining_tokens, state.reset_tokens_s),
    ):
        if limit is not None:
            headers += [
                (b"x-ratelimit-limit-" + kind, b"%d" % limit),
                (b"x-ratelimit-remaining-" + kind, b"%d" % (remaining or 0)),
                (b"x-ratelimit-reset-" + kind, duration(reset_s or 0.0)),
            ]
    return headers


def duration(seconds: float) -> bytes:
    """*seconds* as OpenAI writes them, rounded up: `0ms`, `12ms`, `7s`, `1m3s`, `1h0m5s`."""
    if seconds < 1:
        return b"%dms" % min(ceil(max(seconds, 0.0) * 1000), 999)
    minutes, rest_s = divmod(ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return b"%dh%dm%ds" % (hours, minutes, rest_s)
    return b"%dm%ds" % (minutes, rest_s) if minutes else b"%ds" % rest_s


def _no_route(refused: HTTPException, scope: Scope) -> ServiceError:
    method = scope[CONTEXT].method
    if refused.status_code == 405:
        routes = [one for one in scope["router"].routes if one.path == scope["route"].path]
        allowed = {name for route in routes for name in route.methods}
        return MethodNotAllowed(method=method, allowed=tuple(sorted(allowed)))
    return RouteUnknown(
        f"Nothing is served at this path with {method}. "
        "The API is under /v1, /openai/v1 and /v3/openai; /openapi.json describes it."
    )
