"""The one thread that writes. It commits whatever has gathered as soon as it is free.

It never waits for company: alone, an entry costs one commit; in a crowd, a group shares one.
Knows nothing of keys or requests; whoever hands over an entry gets a future.
"""

import logging
import queue
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from threading import Thread
from typing import Any, TypeAlias, TypeVar
from uuid import uuid4

from trivec.accounts.entries import Entry, Granted, Upkeep
from trivec.accounts.store import Store, unavailable
from trivec.accounts.timeline import Timeline, boot_id
from trivec.accounts.types import StoreHealth
from trivec.core.errors import AllowanceError, StoreUnavailable
from trivec.core.ports import Clock

GROUP_MAX = 512  # entries of one commit
WAITING_MAX = 16_384  # entries; more than 1,024 connections can ever have on the way
UPKEEP_S = 5.0  # a third of how long a claim is held
RETRY_S = 1.0  # between two tries while the store cannot be written
T = TypeVar("T")
log = logging.getLogger("trivec.accounts")


@dataclass(frozen=True, slots=True)
class Job:
    """An entry, or an errand that has the store to itself, and who waits for it."""

    work: Entry | Callable[[], Any]
    future: "Future[Any]"


Item: TypeAlias = Job | None  # None: stop when everything before it is done


class Writer:
    """Owned by `Accounts`, which starts and stops it. All but `start` and `stop` from any thread."""

    def __init__(self, store: Store, *, clock: Clock) -> None:
        self.owner = str(uuid4())  # this process, as the holder of claims
        self._store = store
        self._clock = clock
        self._timeline = Timeline(clock)
        self._boot_id = boot_id()
        self._agreed = False
        self._upkeep_due_s = 0.0
        self._items: queue.SimpleQueue[Item] = queue.SimpleQueue()
        self._thread = Thread(target=self._run, name="trivec-ledger", daemon=True)
        self.health = StoreHealth(writable=True, reason="ok")

    def start(self) -> None:
        self._upkeep_due_s = self._clock.now_s()
        self._thread.start()

    def stop(self) -> None:
        """Write what has been handed over, then end. Nothing may be handed over afterwards."""
        self._items.put(None)
        self._thread.join()

    def submit(self, entry: Entry) -> "Future[Granted]":
        """Have *entry* committed; the future may raise `AllowanceError` or `StoreUnavailable`."""
        return self._hand_over(entry)

    def call(self, errand: Callable[[], T]) -> "Future[T]":
        """Run *errand* in the writer's thread, between two groups."""
        return self._hand_over(errand)

    def _hand_over(self, work: Entry | Callable[[], Any]) -> "Future[Any]":
        future: Future[Any] = Future()
        if self._items.qsize() >= WAITING_MAX:
            future.set_exception(unavailable())
        else:
            self._items.put(Job(work, future))
        return future

    def _run(self) -> None:
        running = True
        while running:
            items = self._gather()
            running = None not in items
            jobs = [
                item
                for item in items
                if item is not None and item.future.set_running_or_notify_cancel()
            ]
            self._commit([job for job in jobs if not callable(job.work)])
            for job in jobs:
                if callable(job.work):
                    _answer(job.work, job.future)

    def _gather(self) -> list[Item]:
        """Wait for an item or until upkeep is due, then take all that is there."""
        patience_s = max(0.0, self._upkeep_due_s - self._clock.now_s())
        items: list[Item] = []
        try:
            items.append(self._items.get(timeout=min(patience_s, UPKEEP_S)))
            while len(items) < GROUP_MAX and items[-1] is not None:
                items.append(self._items.get_nowait())
        except queue.Empty:
            pass
        return items

    def _commit(self, jobs: Sequence[Job]) -> None:
        now_s = self._clock.now_s()
        if now_s >= self._upkeep_due_s:
            jobs = [*jobs, Job(Upkeep(self.owner, self._boot_id), Future())]
            self._upkeep_due_s = now_s + UPKEEP_S
        if not jobs:
            return
        try:
            self._commit_group(jobs)
        except StoreUnavailable as fault:
            self._note(StoreHealth(writable=False, reason=str(fault.__cause__ or fault)))
            self._upkeep_due_s = now_s + RETRY_S
            for job in jobs:
                job.future.set_exception(fault)
        except Exception as fault:  # the outermost loop: a fault of ours must not end the thread
            log.exception("a group of %d entries could not be committed", len(jobs))
            if len(jobs) == 1:
                jobs[0].future.set_exception(fault)
                return
            for job in jobs:  # one bad entry must not take its neighbours with it
                self._commit([job])

    def _commit_group(self, jobs: Sequence[Job]) -> None:
        if not self._agreed:
            proposed_us = self._timeline.offset_proposed_us()
            agreed_us = self._store.agree_offset_us(self._boot_id, proposed_us=proposed_us)
            self._timeline.agree(agreed_us)
            self._agreed = True
        entries = [job.work for job in jobs if not callable(job.work)]
        committed = self._store.commit(entries, now_us=self._timeline.now_us())
        self._timeline.catch_up(committed.now_us)
        self._note(StoreHealth(writable=True, reason="ok"))
        for job, outcome in zip(jobs, committed.outcomes, strict=True):
            if isinstance(outcome, AllowanceError):
                job.future.set_exception(outcome)
            else:
                job.future.set_result(outcome)

    def _note(self, health: StoreHealth) -> None:
        if health.writable != self.health.writable:
            if health.writable:
                log.warning("the ledger can be written again")
            else:
                log.error("the ledger cannot be written: %s", health.reason)
        self.health = health


def _answer(errand: Callable[[], Any], future: "Future[Any]") -> None:
    try:
        future.set_result(errand())
    except Exception as fault:  # the outermost loop: whoever waits hears of it
        future.set_exception(fault)
