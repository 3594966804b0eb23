"""How long a request may take, and whether its client still waits: one timer for all of it.

Nearly every request is answered long before any of its bounds; a timer for each of them and a task
that listens for the client's leaving would be a tenth of what it costs the event loop (decision
0053). So nothing is looked at before `WATCH_AFTER_S`.
"""

import asyncio
from types import TracebackType

from trivec.api.presence import ClientGone, departure
from trivec.api.visit import Visit
from trivec.core.errors import BodyTooSlow, DeadlineExceeded
from trivec.core.ports import Clock
from trivec.settings import HttpLimits

WATCH_AFTER_S = 0.05  # who leaves earlier is noticed then; what was answered by then is billed


class Patience:
    """`with Patience(...):` around a request's handler, in the request's own task.

    Finding out whose key it is, and writing its row, come before and after and have bounds of their
    own (decision 0062, `accounts`). It cancels the block when a bound is passed or the client has left, and raises `BodyTooSlow`,
    `DeadlineExceeded` or `ClientGone` in the cancellation's place, which ends here as that of
    `asyncio.timeout` does.
    """

    __slots__ = (
        "_body_due_s",
        "_body_s_max",
        "_cancelling",
        "_due_s",
        "_has_looked",
        "_is_left_to",
        "_loop",
        "_reason",
        "_task",
        "_timer",
        "_visit",
        "_watcher",
    )

    def __init__(self, visit: Visit, limits: HttpLimits, clock: Clock) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._visit = visit
        self._task = task
        self._cancelling = task.cancelling()
        self._loop = asyncio.get_running_loop()
        began_s = self._loop.time()
        self._body_s_max = limits.body_s_max
        self._body_due_s = began_s + limits.body_s_max
        self._due_s = began_s + visit.deadline_s - clock.now_s()
        self._has_looked = False
        self._is_left_to = False  # the handler has read the body and only waits from here on
        self._reason: Exception | None = None
        self._watcher: asyncio.Task[None] | None = None

    def __enter__(self) -> None:
        first_s = min(self._loop.time() + WATCH_AFTER_S, self._body_due_s, self._due_s)
        self._timer = self._loop.call_at(first_s, self._look)
        self._visit.patience = self

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
        # What holds itself would keep the request's body until the collector comes, which is seldom.
        self._visit.patience = self._watcher = self._reason = None
        if reason is None:
            return
        is_ours = self._task.uncancel() <= self._cancelling
        if is_ours and kind is asyncio.CancelledError:
            try:
                raise reason from None
            finally:
                del reason

    def watch(self) -> None:
        """From here on notice when the client leaves. Call it once the request's body is read."""
        self._is_left_to = True
        if self._has_looked:
            self._start_watcher()

    def _look(self) -> None:
        """On the timer: end what is over its bound, else come back at the next."""
        now_s = self._loop.time() + 1e-3  # a timer may be that much early
        is_reading = self._visit.is_reading_body
        if now_s >= self._due_s:
            self.end(_past_deadline(self._visit))
        elif is_reading and now_s >= self._body_due_s:
            self.end(_body_too_slow(self._body_s_max))
        else:
            self._has_looked = True
            if self._is_left_to:
                self._start_watcher()
            next_s = min(self._body_due_s, self._due_s) if is_reading else self._due_s
            self._timer = self._loop.call_at(next_s, self._look)

    def _start_watcher(self) -> None:
        if self._watcher is None:
            self._watcher = self._loop.create_task(self._watch(), name="client-watch")

    async def _watch(self) -> None:
        await departure(self._visit.receive)
        self.end(ClientGone())

    def end(self, reason: Exception) -> None:
        """Cancel the block, and raise *reason* in its place; of several reasons the first."""
        if self._reason is None:
            self._reason = reason
            self._task.cancel()


def _past_deadline(visit: Visit) -> DeadlineExceeded:
    return DeadlineExceeded(
        f"The request was not done within {visit.deadline_s - visit.started_s:g} seconds. "
        "Please try again, with fewer inputs at a time.",
        retry_after_s=1.0,
    )


def _body_too_slow(body_s_max: float) -> BodyTooSlow:
    return BodyTooSlow(
        f"The request body did not arrive within {body_s_max:g} seconds. "
        "Send it again, in smaller requests."
    )
