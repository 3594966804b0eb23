"""Middleware of Ray Serve's HTTP proxy: what clients are told where no ingress answers.

Ray loads it where RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH says `trivec.cluster.proxy:middlewares`.
A proxy holds no model and reads no settings, so this imports nothing of the service.
"""

import json

from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

RETURN_S = 10  # after which a client should find an ingress started again
REQUEST_ID = "x-request-id"
GONE = "The process that had this request is gone. Please try again."
ERROR = {"message": GONE, "type": "server_error", "param": None, "code": "draining"}
UNANSWERED = json.dumps({"error": ERROR})


def middlewares() -> list[Middleware]:
    """What Ray puts around each proxy's own app."""
    return [Middleware(UnansweredMiddleware)]


class UnansweredMiddleware:
    """503 with `Retry-After` where an ingress died before it answered, or none is there.

    Ray's proxy sends nothing in the first case, which its HTTP server makes a plain 500 of, and no
    `Retry-After` in the second. It also names each request beside us: the ledger's name is kept.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        has_started = scope["type"] != "http"

        async def send_on(message: Message) -> None:
            nonlocal has_started
            has_started = True
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                if message["status"] == 503:
                    headers.setdefault("retry-after", str(RETURN_S))
                if names := headers.getlist(REQUEST_ID):
                    headers[REQUEST_ID] = names[0]
            await send(message)

        await self._app(scope, receive, send_on)
        if not has_started:
            headers = {"retry-after": str(RETURN_S), "retry-after-ms": str(1000 * RETURN_S)}
            answer = Response(UNANSWERED, 503, headers, "application/json")
            await answer(scope, receive, send)
