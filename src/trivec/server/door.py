"""The apps that granian sees: one stands for another, knows who is inside, and can send them out;
one is for probes.
"""

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

PROBE_PATHS = ("/livez", "/readyz", "/health", "/metrics")


class ProbesOnly:
    """Passes on what probes and scrapers ask for, and knows no other path."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in PROBE_PATHS:
            scope["path"] = "/not-for-probes"
        await self._app(scope, receive, send)


class Door:
    """Passes every request on to `app`, which is swapped once the models are ready."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self._inside: set[asyncio.Task[object]] = set()
        self._is_sending_out = False

    @property
    def is_idle(self) -> bool:
        """No request is in flight."""
        return not self._inside

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        visitor = asyncio.current_task()
        assert visitor is not None
        has_begun = False

        async def answer(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        self._inside.add(visitor)
        try:
            await self.app(scope, receive, answer)
        except asyncio.CancelledError:
            if has_begun or not self._is_sending_out:
                raise
            visitor.uncancel()
            await self.app(scope, _gone, send)  # by now it refuses everyone, unread
        finally:
            self._inside.discard(visitor)

    async def send_out(self, *, after_s: float) -> None:
        """Let those inside go by themselves for *after_s*, then have the rest answered 503.

        The app must refuse newcomers by now, before it reads anything of theirs.
        """
        if self._inside:
            await asyncio.wait(self._inside, timeout=after_s)
        self._is_sending_out = True
        for visitor in self._inside:
            visitor.cancel()


async def _gone() -> Message:
    return {"type": "http.disconnect"}
