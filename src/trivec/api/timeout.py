"""Request timeout: one timer for a request's deadline and for its client's presence.

Nearly every request is answered long before either matters; a timer for each and a task that waits
for `http.disconnect` would be a tenth of what it costs the event loop (decision 0006). So no task
starts before `WATCH_AFTER_S`.
"""

import asyncio
from typing import Self

from starlette.types import Receive

from trivec.core.errors import DeadlineExceeded

WATCH_AFTER_S = 0.05  # a client that leaves earlier is noticed then; what was answered is billed


class ClientDisconnected(Exception):
    """The client left, or stopped reading, before its response was out: nothing more is sent."""


class RequestTimeout:
    """Context manager around a request's handler, in the request's own task.

    It cancels the block when the deadline is passed or the client has left, and raises
    `DeadlineExceeded` or `ClientDisconnected` in the cancellation's place, as `asyncio.timeout`
    does. Finding the key and writing the ledger row come before and after, with bounds of their own.
    """

    def __init__(self, receive: Receive, *, request_s_max: float) -> None:
        self._receive = receive
        self._request_s_max = request_s_max
        self._loop = asyncio.get_running_loop()
        self._due_s = self._loop.time() + request_s_max
        self._reason: Exception | None = None
        self._watcher: asyncio.Task[None] | None = None

    def __enter__(self) -> Self:
        task = asyncio.current_task()
        assert task is not None
        self._task, self._cancelling = task, task.cancelling()
        self._timer = self._loop.call_at(self._due_s, self._look)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._timer.cancel()
        if self._watcher is not None:
            self._watcher.cancel()
        reason = self._reason
        # A cycle would keep the request's body until the garbage collector runs, which is seldom.
        self._watcher = self._reason = None
        if reason is None:
            return
        is_ours = self._task.uncancel() <= self._cancelling
        if is_ours and kind is asyncio.CancelledError:
            try:
                raise reason from None
            finally:
                del reason

    def watch_client(self) -> None:
        """From here on notice when the client leaves. Call it once the request's body is read."""
        self._timer.cancel()
        self._timer = self._loop.call_at(
            min(self._loop.time() + WATCH_AFTER_S, self._due_s), self._look
        )

    def end(self, reason: Exception) -> None:
        """Cancel the block and raise *reason* in its place; of several reasons the first."""
        if self._reason is None:
            self._reason = reason
            self._task.cancel()

    def _look(self) -> None:
        if self._loop.time() + 1e-3 >= self._due_s:  # a timer may be that much early
            self.end(
                DeadlineExceeded(
                    f"The request was not done within {self._request_s_max:g} seconds. "
                    "Please try again, with fewer inputs at a time.",
                    retry_after_s=1.0,
                )
            )
        else:
            self._watcher = self._loop.create_task(self._watch(), name="client-watch")
            self._timer = self._loop.call_at(self._due_s, self._look)

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass  # the body is read: what still comes is dropped
        self.end(ClientDisconnected())
