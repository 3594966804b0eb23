"""The one thread that writes. It commits whatever has gathered as soon as it is free.

It never waits for company: alone, an entry costs one commit; in a crowd, a group shares one.
Knows nothing of keys or requests; whoever hands over an entry gets a promise.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from threading import Lock, Thread
from typing import Any, NamedTuple, TypeAlias, TypeVar
from uuid import uuid4

from trivec.accounts.entries import Entry, Granted, Outcome, Upkeep
from trivec.accounts.store import CALL_S_MAX, Store, unavailable
from trivec.accounts.timeline import Timeline, boot_id
from trivec.accounts.types import StoreHealth
from trivec.core.errors import StoreRefused, StoreUnavailable
from trivec.core.ports import Clock

GROUP_MAX = 512  # entries of one commit
WAITING_MAX = 16_384  # entries; more than 1,024 connections can ever have on the way
UPKEEP_S = 5.0  # a third of how long a claim is held
RETRY_S = 1.0  # between two tries while the store cannot be written
HANGS = f"a call to it has not come back within {CALL_S_MAX:g} s"
T = TypeVar("T")
log = logging.getLogger("trivec.accounts")


class Promise(asyncio.Future[Granted]):
    """What comes of an entry. It is kept, whoever loses interest: nobody knows it unwritten.

    A task that is cancelled while it waits is cancelled when the promise is done, and not before.
    """

    def cancel(self, msg: object = None) -> bool:
        return False


class Job(NamedTuple):
    """An entry, and who waits for it on an event loop; nobody waits for our own upkeep."""

    entry: Entry
    waiter: Promise | None


@dataclass(frozen=True, slots=True)
class Errand:
    """Something that has the store to itself, and who waits for it on any thread."""

    run: Callable[[], Any]
    waiter: "Future[Any]"


@dataclass(frozen=True, slots=True)
class Call:
    """A call to the store that is running, and for whom."""

    since_s: float
    items: "Sequence[Job | Errand]"


Item: TypeAlias = Job | Errand | None  # None: stop when everything before it is done
Answer: TypeAlias = Outcome | Exception


class Bell:
    """Wakes the writer's thread; rung twice before anybody hears it, it wakes once."""

    def __init__(self) -> None:
        self._silence = Lock()  # held while nobody has rung
        self._silence.acquire()

    def ring(self) -> None:
        with suppress(RuntimeError):  # it was rung already
            self._silence.release()

    def wait(self, *, seconds_max: float) -> None:
        self._silence.acquire(timeout=seconds_max)


class Writer:
    """Owned by `Accounts`, which starts and stops it. Nothing here waits but `stop`."""

    def __init__(
        self, store: Store, *, clock: Clock, check: Callable[[], None] = lambda: None
    ) -> None:
        """*check* raises `StoreRefused` for a store that must not be written; asked until it passes."""
        self.owner = str(uuid4())  # this process, as the holder of claims
        self._store = store
        self._check = check
        self._clock = clock
        self._timeline = Timeline(clock)
        self._boot_id = boot_id()
        self._agreed = False
        self._upkeep_due_s = 0.0
        self._items: deque[Item] = deque()
        self._call: Call | None = None  # that the store is at
        self._bell = Bell()
        self._thread = Thread(target=self._run, name="trivec-ledger", daemon=True)
        self.health = StoreHealth(writable=True, reason="ok")

    def start(self) -> None:
        self._upkeep_due_s = self._clock.now_s()
        self._thread.start()

    def stop(self) -> None:
        """Write what has been handed over, then end. Nothing may be handed over afterwards."""
        self._items.append(None)
        self._bell.ring()
        self._thread.join()

    def submit(self, entry: Entry) -> Promise:
        """Have *entry* committed; called on an event loop, which is woken once for a whole group.

        The promise may raise `RateLimitError` or `StoreUnavailable`.
        """
        loop = asyncio.get_running_loop()
        promise = Promise(loop=loop)
        if len(self._items) >= WAITING_MAX:
            promise.set_exception(unavailable())
            return promise
        self._items.append(Job(entry, promise))
        if len(self._items) == 1:  # whoever else is ready to run on this loop joins the group
            loop.call_soon(self._bell.ring)
        return promise

    def call(self, errand: Callable[[], T]) -> "Future[T]":
        """Run *errand* in the writer's thread, between two groups."""
        waiter: Future[T] = Future()
        self._items.append(Errand(errand, waiter))
        self._bell.ring()
        return waiter

    @property
    def busy_since_s(self) -> float | None:
        """When the call to the store that is running began; None where none is."""
        call = self._call
        return None if call is None else call.since_s

    def give_up(self, *, since_s: float) -> None:
        """Tell all who wait that the store cannot be written: the call begun then hangs.

        On any thread. What the call comes to in the end is heard by nobody, but a commit stands if it
        was made.
        """
        call = self._call
        if call is None or call.since_s != since_s:
            return  # it came back just now
        self._note(StoreHealth(writable=False, reason=HANGS))
        items: list[Item] = list(call.items)
        stops = False
        while True:
            try:
                item = self._items.popleft()
            except IndexError:
                break
            stops = stops or item is None
            items.append(item)
        if stops:
            self._items.append(None)
        jobs = [item for item in items if isinstance(item, Job)]
        _tell(jobs, [unavailable() for _ in jobs])
        for item in items:
            if isinstance(item, Errand):
                with suppress(InvalidStateError):  # it was done, or left, just now
                    item.waiter.set_exception(unavailable())

    @contextmanager
    def _holding(self, items: Sequence[Job | Errand]) -> Iterator[None]:
        """While the block calls the store for *items*."""
        self._call = Call(self._clock.now_s(), items)
        try:
            yield
        finally:
            self._call = None

    def _run(self) -> None:
        while self._turn():
            pass  # a call each: nothing of one group is held while the next is waited for

    def _turn(self) -> bool:
        """Commit what has gathered; False when it was the last."""
        items = self._gather()
        self._commit([item for item in items if isinstance(item, Job)])
        for item in items:
            if isinstance(item, Errand):
                self._run_errand(item)
        return None not in items

    def _run_errand(self, errand: Errand) -> None:
        if not errand.waiter.set_running_or_notify_cancel():
            return
        try:
            with self._holding([errand]):
                result = errand.run()
        except Exception as fault:  # the outermost loop: whoever waits hears of it
            with suppress(InvalidStateError):  # it was given up meanwhile
                errand.waiter.set_exception(fault)
        else:
            with suppress(InvalidStateError):
                errand.waiter.set_result(result)

    def _gather(self) -> list[Item]:
        """Wait for an item or until upkeep is due, then take all that is there."""
        if not self._items:
            patience_s = max(0.0, self._upkeep_due_s - self._clock.now_s())
            self._bell.wait(seconds_max=min(patience_s, UPKEEP_S))
        items: list[Item] = []
        while self._items and len(items) < GROUP_MAX:
            items.append(self._items.popleft())
            if items[-1] is None:
                break
        return items

    def _commit(self, jobs: Sequence[Job]) -> None:
        now_s = self._clock.now_s()
        if now_s >= self._upkeep_due_s:
            jobs = [*jobs, Job(Upkeep(self.owner, self._boot_id), None)]
            self._upkeep_due_s = now_s + UPKEEP_S
        if not jobs:
            return
        answers: Sequence[Answer]
        try:
            with self._holding(jobs):
                answers = self._commit_group([job.entry for job in jobs])
        except (StoreUnavailable, StoreRefused) as fault:
            self._note(StoreHealth(writable=False, reason=str(fault.__cause__ or fault)))
            self._upkeep_due_s = now_s + RETRY_S
            answers = [unavailable() for _ in jobs]  # each its own: whoever raises it holds much
        except Exception as fault:  # the outermost loop: a fault of ours must not end the thread
            log.exception("a group of %d entries could not be committed", len(jobs))
            if len(jobs) > 1:
                for job in jobs:  # one bad entry must not take its neighbours with it
                    self._commit([job])
                return
            answers = [fault.with_traceback(None)]  # it was logged, and leads back to who waits
        _tell(jobs, answers)

    def _commit_group(self, entries: Sequence[Entry]) -> Sequence[Outcome]:
        if not self._agreed:
            self._check()
            proposed_us = self._timeline.offset_proposed_us()
            agreed_us = self._store.agree_offset_us(self._boot_id, proposed_us=proposed_us)
            self._timeline.agree(agreed_us)
            self._agreed = True
        committed = self._store.commit(entries, now_us=self._timeline.now_us())
        self._timeline.catch_up(committed.now_us)
        self._note(StoreHealth(writable=True, reason="ok"))
        return committed.outcomes

    def _note(self, health: StoreHealth) -> None:
        if health.writable != self.health.writable:
            if health.writable:
                log.warning("the ledger can be written again")
            else:
                log.error("the ledger cannot be written: %s", health.reason)
        self.health = health


def _tell(jobs: Sequence[Job], answers: Sequence[Answer]) -> None:
    """Wake each event loop once."""
    by_loop: dict[asyncio.AbstractEventLoop, list[Told]] = {}
    for job, answer in zip(jobs, answers, strict=True):
        if job.waiter is not None:
            by_loop.setdefault(job.waiter.get_loop(), []).append(Told(job.waiter, answer))
    for loop, told in by_loop.items():
        with suppress(RuntimeError):  # the loop was closed: nobody is left to hear
            loop.call_soon_threadsafe(_resolve, told)


class Told(NamedTuple):
    """An answer on its way to whoever waits for it."""

    waiter: Promise
    answer: Answer


def _resolve(told: Sequence[Told]) -> None:
    """On the event loop."""
    for waiter, answer in told:
        if waiter.done():
            continue  # it was given up, and its call has come back since
        if isinstance(answer, Exception):
            waiter.set_exception(answer)
        else:
            waiter.set_result(answer)
