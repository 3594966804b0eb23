"""Granian's embedded server upon our own listening socket.

It knows HTTP/1 and TLS, and stops when told; signals and stages are `serving`'s.
"""

import os
import socket
from pathlib import Path

from granian._granian import SocketHolder
from granian.constants import HTTPModes, Interfaces, SSLProtocols
from granian.http import HTTP1Settings
from granian.log import LogLevels
from granian.server.embed import Server
from starlette.types import ASGIApp

from trivec.server.listening import BACKLOG
from trivec.settings import HttpLimits

HEAD_BYTES_MAX = 64 * 1024  # of a request's head; also the largest piece of a body handed on


class Carrier(Server):
    """Granian, embedded in our event loop: HTTP/1 only, on a socket that we own.

    `serve()` runs until `stop()` is called and the last accepted request has been answered; it
    stops listening at once and closes idle connections.
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
        _drop_who_takes_nothing(listener, after_s=limits.answer_chunk_s_max)
        cert, key = tls if tls else (None, None)
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


def _drop_who_takes_nothing(listener: socket.socket, *, after_s: float) -> None:
    """Have the kernel end a connection whose client has taken nothing for so long.

    What granian still holds of an answer it would offer for ever, after the app has given up. An
    accepted connection inherits the option; where there is none (not Linux) it has to do without.
    """
    option = getattr(socket, "TCP_USER_TIMEOUT", None)
    if option is not None:
        listener.setsockopt(socket.IPPROTO_TCP, option, round(after_s * 1000))
