"""The app that granian sees: it stands for another, knows who is inside, and can send them out."""

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send


class Door:
    """Passes every request on to `app`, which is swapped once the models are ready."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self._inside: set[asyncio.Task[object]] = set()
        self._is_sending_out = False

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
