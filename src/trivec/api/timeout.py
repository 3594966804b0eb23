"""Request timeout: one timer for a request's deadline, its body's, and its client's presence.

Nearly every request is answered long before any of its bounds; a timer for each and a task that
waits for `http.disconnect` would be a tenth of what it costs the event loop (decision 0053). So
nothing is looked at before `WATCH_AFTER_S`.
"""

import asyncio
from types import TracebackType
from typing import Self

from starlette.types import Receive

from trivec.core.errors import BodyTooSlow, DeadlineExceeded

WATCH_AFTER_S = 0.05  # a client that leaves earlier is noticed then; what was answered is billed


class ClientDisconnected(Exception):
    """The client left, or stopped reading, before its answer was out: no answer is sent."""


class RequestTimeout:
    """Context manager around a request's handler, in the request's own task.

    It cancels the block when a bound is passed or the client has left, and raises `BodyTooSlow`,
    `DeadlineExceeded` or `ClientDisconnected` in the cancellation's place, as `asyncio.timeout`
    does. Finding the key and writing the row come before and after, with bounds of their own.
    """

    __slots__ = (
        "_body_due_s",
        "_body_s_max",
        "_cancelling",
        "_due_s",
        "_has_looked",
        "_loop",
        "_may_watch",
        "_reason",
        "_receive",
        "_request_s_max",
        "_task",
        "_timer",
        "_watcher",
        "is_reading_body",
    )

    def __init__(
        self, receive: Receive, *, left_s: float, request_s_max: float, body_s_max: float
    ) -> None:
        """*left_s* of *request_s_max* are left from now on."""
        task = asyncio.current_task()
        assert task is not None
        self._receive = receive
        self._task = task
        self._cancelling = task.cancelling()
        self._loop = asyncio.get_running_loop()
        now_s = self._loop.time()
        self._request_s_max = request_s_max
        self._body_s_max = body_s_max
        self._due_s = now_s + left_s
        self._body_due_s = now_s + body_s_max
        self._has_looked = False
        self._may_watch = False
        self._reason: Exception | None = None
        self._watcher: asyncio.Task[None] | None = None
        self.is_reading_body = False

    def __enter__(self) -> Self:
        first_s = min(self._loop.time() + WATCH_AFTER_S, self._body_due_s, self._due_s)
        self._timer = self._loop.call_at(first_s, self._look)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
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
        self._may_watch = True
        if self._has_looked:
            self._start_watcher()

    def end(self, reason: Exception) -> None:
        """Cancel the block and raise *reason* in its place; of several reasons the first."""
        if self._reason is None:
            self._reason = reason
            self._task.cancel()

    def _look(self) -> None:
        """On the timer: end what is over its bound, else come back at the next bound."""
        now_s = self._loop.time() + 1e-3  # a timer may be that much early
        if now_s >= self._due_s:
            self.end(
                DeadlineExceeded(
                    f"The request was not done within {self._request_s_max:g} seconds. "
                    "Please try again, with fewer inputs at a time.",
                    retry_after_s=1.0,
                )
            )
        elif self.is_reading_body and now_s >= self._body_due_s:
            self.end(
                BodyTooSlow(
                    f"The request body did not arrive within {self._body_s_max:g} seconds. "
                    "Send it again, in smaller requests."
                )
            )
        else:
            self._has_looked = True
            if self._may_watch:
                self._start_watcher()
            body_due_s = self._body_due_s if self.is_reading_body else self._due_s
            self._timer = self._loop.call_at(min(body_due_s, self._due_s), self._look)

    def _start_watcher(self) -> None:
        if self._watcher is None:
            self._watcher = self._loop.create_task(self._watch(), name="client-watch")

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass  # the body is read: what still comes is dropped
        self.end(ClientDisconnected())
