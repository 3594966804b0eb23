"""The real clock, and futures and deadlines on an event loop. Tests move a clock by hand instead."""

import asyncio
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from math import inf
from typing import Generic, TypeVar

T = TypeVar("T")

EARLY_S = 1e-3  # by which a timer may be early


class SystemClock:
    """`Clock` by the operating system."""

    now_s = staticmethod(time.monotonic)
    wall_s = staticmethod(time.time)


def resolve(answers: Iterable[tuple["asyncio.Future[T]", T | Exception]]) -> None:
    """Give each future its result or its error, from any thread, waking each event loop once.

    One that is done by then, since nothing waits for it any more, is left as it is.
    """
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Future[T], T | Exception]]] = {}
    for future, answer in answers:
        by_loop.setdefault(future.get_loop(), []).append((future, answer))
    for loop, own in by_loop.items():
        with suppress(RuntimeError):  # the loop is closed, so nothing waits at all
            loop.call_soon_threadsafe(_resolve, own)


def _resolve(answers: "list[tuple[asyncio.Future[T], T | Exception]]") -> None:
    for future, answer in answers:
        if future.done():
            continue
        if isinstance(answer, Exception):
            future.set_exception(answer)
        else:
            future.set_result(answer)


class Deadlines(Generic[T]):
    """Deadlines on an event loop that nearly never come: one timer for all of them.

    Each on a timer of its own, made and cancelled, they were a tenth of what a short request costs
    the loop. The timer is set for the earliest; when that was unset meanwhile, it is set anew.
    """

    def __init__(self, call: Callable[[T], object]) -> None:
        """*call* gets what is due, which is unset by then. It may set others."""
        self._call = call
        self._due_s: dict[T, float] = {}
        self._timer: asyncio.TimerHandle | None = None

    def set(self, what: T, due_s: float | None) -> None:
        """Call for *what* at *due_s* on the running loop's clock, whatever was set for it before.

        None: not at all.
        """
        if due_s is None:
            self._due_s.pop(what, None)
            return
        self._due_s[what] = due_s
        if self._timer is not None:
            if self._timer.when() <= due_s:
                return
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_at(due_s, self._look)

    def _look(self) -> None:
        loop = asyncio.get_running_loop()
        late_s = loop.time() + EARLY_S
        due = [what for what, due_s in self._due_s.items() if due_s <= late_s]
        due.sort(key=self._due_s.__getitem__)
        try:  # what is set meanwhile leaves the timer, which is over, to the end
            for what in due:
                if self._due_s.get(what, inf) <= late_s:  # else another's call has moved it
                    del self._due_s[what]
                    self._call(what)
        finally:
            if self._timer is not None:
                self._timer.cancel()
            due_s = min(self._due_s.values(), default=None)
            self._timer = None if due_s is None else loop.call_at(due_s, self._look)
