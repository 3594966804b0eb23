"""Request middleware, as plain ASGI: id and headers, errors into responses, one event for the log."""

import asyncio
import logging
import re
from math import ceil

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from trivec.api.auth import Endpoint
from trivec.api.context import CONTEXT, AppState, ClientDisconnected, RequestContext
from trivec.api.errors import CLIENT_GONE, OPENAI, TABLE, error_response, fault_of
from trivec.core.errors import EngineFault, MethodNotAllowed, RouteUnknown, ServiceError, is_panic
from trivec.core.events import RequestServed
from trivec.settings import HttpLimits

FIT_FOR_LOG = re.compile(rb"[ -~]{1,512}")  # short, printable ASCII
_log = logging.getLogger(__name__)


class RequestMiddleware:
    """Opens the context, answers what was raised, adds headers, tells the observer how it ended.

    The outermost loop of a request: whatever is raised below becomes a response here, once.
    """

    def __init__(self, app: ASGIApp, state: AppState) -> None:
        self._app = app
        self._state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # Starlette's router answers lifespan and refuses web sockets
            await self._app(scope, receive, send)
            return
        context = scope[CONTEXT] = RequestContext(scope, receive, self._state)
        scope["app"] = self._state  # so that the router raises where it finds no route

        async def send_response(message: Message) -> None:
            if message["type"] == "http.response.start":
                context.status = message["status"]
                message["headers"] += response_headers(context)
                await send(message)
                return
            body = b"" if context.method == "HEAD" else message.get("body", b"")
            if len(body) > context.app.limits.answer_chunk_bytes:
                await send_in_chunks(context, message, send)
                return
            context.response_bytes += len(body)
            await send({**message, "body": bytes(body)})

        try:
            await self._app(scope, receive, send_response)
        except ClientDisconnected:
            context.error_code = "client_gone"
        except BaseException as raised:
            if not await respond_to_error(raised, scope, receive, send_response):
                raise
        finally:
            context.memory.shrink(0)
            observe(context, scope)
        if context.status is not None and not context.is_body_read:
            await context.drop_body()


async def respond_to_error(
    raised: BaseException, scope: Scope, receive: Receive, send: Send
) -> bool:
    """Answer *raised* by the table; False for a cancellation, which goes on.

    A function of its own: a frame that an error has passed and that still names it is a cycle,
    which would keep the request's body.
    """
    context: RequestContext = scope[CONTEXT]
    if isinstance(raised, ServiceError):
        error = raised
    elif isinstance(raised, HTTPException):  # the router's own
        is_known = context.method != "other"
        error = RouteUnknown(
            f"Nothing is served at this path with {context.method if is_known else 'this method'}. "
            "The API is under /v1, /openai/v1 and /v3/openai; /openapi.json describes it."
        )
        if raised.status_code == 405:
            context.prefix = scope["route"].endpoint.operation.prefix
            routes = [one for one in scope["router"].routes if one.path == scope["route"].path]
            allowed = {name for route in routes for name in route.methods}
            error = MethodNotAllowed(
                method=context.method if is_known else "This method",
                allowed=tuple(sorted(allowed)),
            )
    elif isinstance(raised, Exception) or is_panic(raised):
        error = fault_of(raised)
    else:
        return False
    if isinstance(error, EngineFault):
        _log.error("request %s failed: %s", context.request_id, error)
    row = TABLE[type(error)]
    context.error_code = row.code or row.type
    context.error_message = str(error) if row.status < 500 else None
    if context.status is None:  # else the connection is cut: half a response must not look whole
        endpoint = getattr(scope.get("route"), "endpoint", None)
        shape = endpoint.operation.error_shape if isinstance(endpoint, Endpoint) else OPENAI
        response = error_response(error, request_id=context.request_id, shape=shape)
        await response(scope, receive, send)
    return True


def observe(context: RequestContext, scope: Scope) -> None:
    """Tell the observer how the request ended."""
    status = CLIENT_GONE if context.status is None else context.status
    client_request_id, traceparent = (
        value.decode() if FIT_FOR_LOG.fullmatch(value := context.headers.get(name, b"")) else None
        for name in (b"x-client-request-id", b"traceparent")
    )
    context.app.observer.observe(
        RequestServed(
            request_id=context.request_id,
            client_request_id=client_request_id,
            method=context.method,
            route=scope["route"].path_format if "route" in scope else "other",
            prefix=context.prefix,
            status=status,
            code=context.error_code,
            key_id=context.caller.id if context.caller is not None else None,
            model=context.model,
            input_count=context.input_count,
            token_count=context.token_count if status < 400 else 0,
            request_bytes=context.request_bytes,
            response_bytes=context.response_bytes,
            duration_s=context.app.clock.now_s() - context.started_s,
            tokenize_s=context.tokenize_s,
            queue_s=context.queue_s,
            compute_s=context.compute_s,
            encode_s=context.encode_s,
            traceparent=traceparent,
            ended_s=context.app.clock.wall_s(),
            message=context.error_message,
        )
    )


async def send_in_chunks(context: RequestContext, message: Message, send: Send) -> None:
    """Send a large body. Raises `ClientDisconnected` where its client takes it too slowly.

    The server below has no deadline for writing, so a client that never reads would hold its
    response in memory for ever.
    """
    body, limits, loop = message["body"], context.app.limits, asyncio.get_running_loop()
    began_s = loop.time()
    for start in range(0, len(body), limits.answer_chunk_bytes):
        chunk = bytes(body[start : start + limits.answer_chunk_bytes])
        end = start + len(chunk)
        context.response_bytes += len(chunk)
        has_more = end < len(body) or message.get("more_body", False)
        due_s = chunk_s_max(limits, elapsed_s=loop.time() - began_s, sent_bytes=end)
        try:
            async with asyncio.timeout(due_s):
                await send({**message, "body": chunk, "more_body": has_more})
        except TimeoutError:
            raise ClientDisconnected from None


def chunk_s_max(limits: HttpLimits, *, elapsed_s: float, sent_bytes: int) -> float:
    """Seconds in which the client must take the chunk that ends at *sent_bytes* of a response.

    A bound for each chunk alone would let a client hold a response for ever at one chunk in half a
    minute, so all together have a rate, too. The kernel and the server below hold some of it for
    the client, hence the first chunk's seconds on top.
    """
    due_s = limits.answer_chunk_s_max + sent_bytes / limits.answer_bytes_per_s_min
    return max(0.0, min(limits.answer_chunk_s_max, due_s - elapsed_s))


def response_headers(context: RequestContext) -> list[tuple[bytes, bytes]]:
    """The headers of every response: its id, where its time went, what is left of the rate limits.

    The rate limits' are OpenAI's six, without those of a kind that has no limit.
    """
    app, state = context.app, context.rate_limits
    elapsed_ms = round((app.clock.now_s() - context.started_s) * 1000)
    parts_s = (context.tokenize_s, context.queue_s, context.compute_s, context.encode_s)
    timing = b"tokenize;dur=%.3f, queue;dur=%.3f, compute;dur=%.3f, encode;dur=%.3f"
    headers = [
        (b"x-request-id", context.request_id.encode()),
        (b"openai-processing-ms", b"%d" % elapsed_ms),
        (b"server-timing", timing % tuple(seconds * 1e3 for seconds in parts_s)),
    ]
    if state is not None:
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
    if context.waits_for_100 or app.health().phase in ("draining", "stopped"):
        headers.append((b"connection", b"close"))
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
