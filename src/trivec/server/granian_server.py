"""Granian embedded in our event loop, and the ASGI apps around ours that it calls."""

import asyncio
import os
import socket
from pathlib import Path

from granian._granian import SocketHolder
from granian.constants import HTTPModes, Interfaces, SSLProtocols
from granian.http import HTTP1Settings
from granian.log import LogLevels
from granian.server.embed import Server
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from trivec.api.context import CONTEXT
from trivec.server.machine import BACKLOG
from trivec.settings import HttpLimits

HEAD_BYTES_MAX = 64 * 1024  # of a request's head; also the largest piece of a body handed on
PROBE_PATHS = ("/livez", "/readyz", "/health", "/metrics")


class GranianServer(Server):
    """HTTP/1 on a socket of ours, which it takes over.

    `serve()` runs until `stop()` is called and the last accepted request has been answered; `stop`
    ends listening at once and closes idle connections.
    """

    def __init__(
        self,
        app: ASGIApp,
        listener: socket.socket,
        *,
        limits: HttpLimits,
        tls: tuple[Path, Path] | None,
    ) -> None:
        self._listener = listener
        # Granian would offer the rest of an answer for ever after the app has given up, so the
        # kernel ends a connection whose client takes nothing. Accepted connections inherit it.
        option = getattr(socket, "TCP_USER_TIMEOUT", None)  # only Linux has it
        if option is not None:
            timeout_ms = round(limits.answer_chunk_s_max * 1000)
            listener.setsockopt(socket.IPPROTO_TCP, option, timeout_ms)
        cert, key = tls or (None, None)
        super().__init__(
            app,
            interface=Interfaces.ASGINL,
            http=HTTPModes.http1,
            websockets=False,
            backpressure=limits.connections_max,
            http1_settings=HTTP1Settings(
                header_read_timeout=round(limits.idle_s_max * 1000),
                max_buffer_size=HEAD_BYTES_MAX,
            ),
            ssl_cert=cert,
            ssl_key=key,
            ssl_protocol_min=SSLProtocols.tls12,
            log_level=LogLevels.error,
            log_dictconfig={"loggers": {"_granian": {"handlers": [], "propagate": True}}},
        )

    def _init_shared_socket(self) -> None:
        """Granian would bind by itself; it gets our socket instead, and closes this copy."""
        self._ssp = None
        fd = os.dup(self._listener.fileno())
        self._shd = SocketHolder(fd, False, BACKLOG)  # type: ignore[call-arg, assignment] # unstubbed
        self._listener.close()

    def stop(self) -> None:
        """Stop listening, finish what was accepted, then let `serve` return."""
        self.interrupt_signal = True
        self.main_loop_interrupt.set()


class SwappableApp:
    """ASGI app that can be swapped, and its requests cancelled, while they are in flight."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self._in_flight: set[asyncio.Task[object]] = set()
        self._is_cancelling = False

    @property
    def is_idle(self) -> bool:
        """No request is in flight."""
        return not self._in_flight

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = asyncio.current_task()
        assert request is not None
        self._in_flight.add(request)
        try:
            await self.app(scope, receive, send)
        except asyncio.CancelledError:
            context = scope.get(CONTEXT)  # none where it is no HTTP request
            has_begun = context is None or context.status is not None
            if has_begun or not self._is_cancelling:
                raise
            request.uncancel()
            await self.app(scope, _disconnected, send)  # by now it answers 503, the body unread
        finally:
            self._in_flight.discard(request)

    async def cancel_requests(self, *, after_s: float) -> None:
        """Wait *after_s* for the requests in flight, then have the rest answered by `app` again.

        By now `app` must refuse every request before it reads anything of it.
        """
        if self._in_flight:
            await asyncio.wait(self._in_flight, timeout=after_s)
        self._is_cancelling = True
        for request in self._in_flight:
            request.cancel()


async def _disconnected() -> Message:
    return {"type": "http.disconnect"}


def probes_only(app: ASGIApp) -> ASGIApp:
    """*app* for probes and scrapers: every other path is not found."""

    async def probes(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in PROBE_PATHS:
            scope["path"] = "/not-for-probes"
        await app(scope, receive, send)

    return probes
