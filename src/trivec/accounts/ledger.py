"""Usage ledger: what is written for each request, and the one thread that writes it.

All that a request asks of the store is an `Entry`. The writer's thread commits the entries that have
gathered as soon as it is free, and never waits for more: alone, an entry costs one commit; under
load, a group of them shares one. A `Transaction` decides a group in memory, the same for every store.
"""

import asyncio
import logging
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from threading import Event, Thread
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeVar

from trivec.accounts import rate_limits
from trivec.accounts.rate_limits import NOTHING, Bucket, Cost, LimitExceeded
from trivec.accounts.types import (
    Key,
    RateLimits,
    RateLimitState,
    StoreHealth,
    UsageLine,
    UsageQuery,
)
from trivec.accounts.utc import DAY_US, MINUTE_US, SECOND_US
from trivec.core.errors import (
    FieldInvalid,
    RateLimitExceeded,
    StoreRefused,
    StoreUnavailable,
)
from trivec.core.ports import Clock

CALL_S_MAX = 5.0  # a commit, or a read of keys, that takes longer counts as hanging
RETRY_AFTER_S = 2.0  # a store that came back is noticed within 1 s
ERROR_FROM = 400  # statuses from here on are failures
GROUP_MAX = 512  # entries of one commit
WAITING_MAX = 16_384  # entries; more than 1,024 connections can ever have waiting
PROBE_S = 5.0  # between two writes of an idle process
RETRY_S = 1.0  # between two tries while the store cannot be written
HANGS = f"a call to it has not come back within {CALL_S_MAX:g} s"
DIED = "the thread that writes the ledger has died"
T = TypeVar("T")
log = logging.getLogger("trivec.accounts")


@dataclass(frozen=True, slots=True)
class LedgerRow:
    """One authenticated request."""

    time_us: int  # wall clock, microseconds since the epoch
    request_id: str
    key_id: str
    model: str | None
    input_count: int
    token_count: int  # billed; a request of 0 is counted instead of having a row
    status: int
    duration_us: int
    user_digest: str | None


class Count(NamedTuple):
    """What requests that cost no tokens have in common: they are counted, and have no row each."""

    key_id: str
    model: str | None
    status: int
    minute: int  # since the epoch


class KeyDay(NamedTuple):
    """The use of a model with a key on a day."""

    key_id: str
    model: str | None
    day: int  # since the epoch, in UTC


@dataclass(slots=True)
class Total:
    """Sums over requests."""

    requests: int = 0
    failed: int = 0
    tokens: int = 0

    def add(self, requests: int, *, status: int, tokens: int = 0) -> None:
        self.requests += requests
        self.failed += requests if status >= ERROR_FROM else 0
        self.tokens += tokens


@dataclass(frozen=True, slots=True)
class Reserve:
    """Take *cost* out of a key's bucket, all or nothing."""

    key_id: str
    limits: RateLimits
    cost: Cost


@dataclass(frozen=True, slots=True)
class RecordUsage:
    """Record a request, and give back what it did not use of its reservation."""

    row: LedgerRow
    limits: RateLimits | None = None  # None: its bucket stays as it is
    unused: Cost = NOTHING


@dataclass(frozen=True, slots=True)
class WriteCheck:
    """Write something, so that an idle process learns whether it can."""


Entry: TypeAlias = Reserve | RecordUsage | WriteCheck
Granted: TypeAlias = RateLimitState | None  # None: the entry touched no bucket
Outcome: TypeAlias = Granted | RateLimitExceeded


@dataclass(frozen=True, slots=True)
class Committed:
    """One outcome an entry, in their order, and the instant at which they were decided."""

    outcomes: Sequence[Outcome]
    now_us: int


class Transaction:
    """One group of entries, decided in order over the buckets that they touch. No clock, no SQL.

    A store reads and locks the buckets of `keys_touched`, applies each entry, writes what has
    changed, and commits.
    """

    def __init__(self, *, now_us: int, buckets: Mapping[str, Bucket]) -> None:
        # Another machine's clock may be ahead of ours: then its last instant is ours too.
        self.now_us = max([now_us, *(bucket.at_us for bucket in buckets.values())])
        self._buckets = dict(buckets)
        self.buckets_changed: dict[str, Bucket] = {}
        self.rows: list[LedgerRow] = []
        self.counts: Counter[Count] = Counter()
        self.has_probe = False

    def apply(self, entry: Entry) -> Outcome:
        match entry:
            case Reserve(key_id, limits, cost):
                bucket = self._buckets.get(key_id, Bucket())
                taken = rate_limits.reserve(bucket, limits, cost, now_us=self.now_us)
                if isinstance(taken, LimitExceeded):
                    return RateLimitExceeded(
                        kind=taken.kind,
                        limit=taken.limit,
                        requested=taken.requested,
                        retry_after_s=taken.retry_after_us / SECOND_US,
                    )
                return self._put(key_id, taken, limits)
            case RecordUsage(row, limits, unused):
                if row.token_count == 0:
                    minute = row.time_us // MINUTE_US
                    self.counts[Count(row.key_id, row.model, row.status, minute)] += 1
                else:
                    self.rows.append(row)
                if limits is None:
                    return None
                bucket = self._buckets.get(row.key_id, Bucket())
                bucket = rate_limits.give_back(bucket, limits, unused, now_us=self.now_us)
                return self._put(row.key_id, bucket, limits)
            case WriteCheck():
                self.has_probe = True
                return None

    def totals(self) -> dict[KeyDay, Total]:
        """Sums of the rows and counts, by day."""
        totals: dict[KeyDay, Total] = {}
        for row in self.rows:
            day = KeyDay(row.key_id, row.model, row.time_us // DAY_US)
            totals.setdefault(day, Total()).add(1, status=row.status, tokens=row.token_count)
        for count, requests in self.counts.items():
            day = KeyDay(count.key_id, count.model, count.minute * MINUTE_US // DAY_US)
            totals.setdefault(day, Total()).add(requests, status=count.status)
        return totals

    def _put(self, key_id: str, bucket: Bucket, limits: RateLimits) -> RateLimitState:
        self._buckets[key_id] = self.buckets_changed[key_id] = bucket
        return rate_limits.state(bucket, limits, now_us=self.now_us)


def keys_touched(entries: Iterable[Entry]) -> list[str]:
    """Ids of the keys whose bucket must be read and locked, in the order that all processes use."""
    touched = set()
    for entry in entries:
        if isinstance(entry, Reserve):
            touched.add(entry.key_id)
        elif isinstance(entry, RecordUsage) and entry.limits is not None:
            touched.add(entry.row.key_id)
    return sorted(touched)


@dataclass(frozen=True, slots=True)
class KeyChanges:
    """Every key that changed after some revision, and the latest revision."""

    revision: int
    keys: tuple[Key, ...]


class Store(Protocol):
    """Storage of keys, buckets and the ledger. `tests/contract/test_store.py` runs against each one.

    All methods block. `commit` is called by one thread, the others by any. Each raises
    `StoreUnavailable`, with the driver's error as its cause, when it cannot read or write.
    """

    def commit(self, entries: Sequence[Entry], *, now_us: int) -> Committed:
        """Decide and write *entries* in order, all or none; durable when it returns."""
        ...

    def agree_secret_check(self, proposed: bytes) -> bytes:
        """The check of the server's secret: the first one that any process proposed."""
        ...

    def keys_since(self, revision: int) -> KeyChanges:
        """Keys that were made or changed after *revision*; 0 for all."""
        ...

    def add_key(self, key: Key) -> None:
        """Raises `FieldInvalid` when a key that is not revoked has this name."""
        ...

    def change_key(self, key_id: str, change: Callable[[Key], Key]) -> Key:
        """Replace a key by the result of *change*, which is pure; no other change comes between."""
        ...

    def usage(self, query: UsageQuery) -> list[UsageLine]:
        """Sums over the ledger, ordered by group; the caller fills in names."""
        ...

    def interrupt(self) -> None:
        """Break off the calls of other threads: they raise `StoreUnavailable`.

        A commit may have become durable all the same. It never blocks, and does nothing where
        nothing can be broken off, as with a disk that hangs.
        """
        ...

    def close(self) -> None:
        """Close files and connections; the store is not used again."""
        ...


def name_taken(name: str) -> FieldInvalid:
    return FieldInvalid(f"There is a key named {name} already; choose another.", param="name")


def unavailable() -> StoreUnavailable:
    """The client's message, whatever the store's own words were."""
    return StoreUnavailable(
        "Usage cannot be recorded right now, so nothing is served. Please try again in "
        f"{RETRY_AFTER_S:.0f} s.",
        retry_after_s=RETRY_AFTER_S,
    )


class Promise(asyncio.Future[Granted]):
    """The result of an entry. It cannot be cancelled: an entry that was handed over is committed.

    A task that is cancelled while it waits is cancelled when the promise is done, and not before.
    """

    def cancel(self, msg: object = None) -> bool:
        return False


class Job(NamedTuple):
    """An entry and the promise of its result; our own probes have none."""

    entry: Entry
    promise: Promise | None


@dataclass(frozen=True, slots=True)
class StoreTask:
    """A function that has the store to itself, and the future of its result."""

    run: Callable[[], Any]
    future: "Future[Any]"


@dataclass(frozen=True, slots=True)
class StoreCall:
    """A call to the store that is running, and what it runs."""

    since_s: float
    items: "Sequence[Job | StoreTask]"


Item: TypeAlias = Job | StoreTask | None  # None: stop when everything before it is done
Answer: TypeAlias = Outcome | Exception


class LedgerWriter:
    """The thread that commits entries, owned by `Accounts`. Only `stop` blocks.

    Its time for buckets is the monotonic clock, set by the wall clock at the start, and moved on
    where a bucket was written later: by another machine, or before the wall clock was set back. So a
    wall clock that is set by hand neither refills buckets while we run nor ever blocks a key.
    """

    def __init__(
        self, store: Store, *, clock: Clock, check: Callable[[], None] = lambda: None
    ) -> None:
        """*check* raises `StoreRefused` for a store that must not be written; run until it passes."""
        self.health = StoreHealth(writable=True, reason="ok")
        self.died: Future[str] = Future()  # why the thread has died, if it has
        self._store = store
        self._check = check
        self._is_checked = False
        self._clock = clock
        self._offset_us = int((clock.wall_s() - clock.now_s()) * 1e6)
        self._probe_due_s = 0.0
        self._items: deque[Item] = deque()
        self._has_items = Event()
        self._taken: list[Item] = []  # of this turn
        self._call: StoreCall | None = None
        self._thread = Thread(target=self._run, name="trivec-ledger", daemon=True)

    def start(self) -> None:
        self._probe_due_s = self._clock.now_s()
        self._thread.start()

    def stop(self) -> None:
        """Write what was handed over, then end. Nothing may be handed over afterwards."""
        self._items.append(None)
        self._has_items.set()
        self._thread.join()

    def submit(self, entry: Entry) -> Promise:
        """Have *entry* committed; called on an event loop, which is woken once for a whole group.

        The promise may raise `RateLimitExceeded` or `StoreUnavailable`.
        """
        loop = asyncio.get_running_loop()
        promise = Promise(loop=loop)
        if len(self._items) >= WAITING_MAX or self.died.done():
            promise.set_exception(unavailable())
            return promise
        self._items.append(Job(entry, promise))
        if len(self._items) == 1:  # at the end of the loop's turn: its other ready tasks join
            loop.call_soon(self._has_items.set)
        return promise

    def call(self, run: Callable[[], T]) -> "Future[T]":
        """Call *run* in the writer's thread, between two groups."""
        future: Future[T] = Future()
        if self.died.done():
            future.set_exception(unavailable())
            return future
        self._items.append(StoreTask(run, future))
        self._has_items.set()
        return future

    @property
    def busy_since_s(self) -> float | None:
        """When the running call to the store began; None where none is."""
        call = self._call
        return None if call is None else call.since_s

    def give_up(self, *, since_s: float) -> None:
        """Fail everything that waits with `StoreUnavailable`: the call begun at *since_s* hangs.

        On any thread. The result of that call is dropped, but a commit stands if it was made.
        """
        call = self._call
        if call is None or call.since_s != since_s:
            return  # it came back just now
        self._note(StoreHealth(writable=False, reason=HANGS))
        self._fail(call.items)

    def _run(self) -> None:
        try:
            while self._turn():
                pass  # a call each: nothing of one group is held while the next is waited for
        except BaseException as fault:
            # `_commit` and `_run_task` catch what entries and tasks raise, so this is our own bug:
            # the process refuses what would be unmetered, and is to be restarted.
            log.critical("%s", DIED, exc_info=fault)
            self._note(StoreHealth(writable=False, reason=DIED))
            self.died.set_result(f"{DIED}: {type(fault).__name__}")
            self._call = None
            self._fail(self._taken)

    def _turn(self) -> bool:
        """Commit what has gathered; False when it was the last."""
        if not self._items:
            wait_s = max(0.0, self._probe_due_s - self._clock.now_s())
            self._has_items.wait(min(wait_s, PROBE_S))
        self._has_items.clear()
        items: list[Item] = []
        self._taken = items
        while self._items and len(items) < GROUP_MAX:
            items.append(self._items.popleft())
            if items[-1] is None:
                break
        self._commit([item for item in items if isinstance(item, Job)])
        for item in items:
            if isinstance(item, StoreTask):
                self._run_task(item)
        return None not in items

    @contextmanager
    def _during(self, items: "Sequence[Job | StoreTask]") -> Iterator[None]:
        """While the block calls the store for *items*; over before they are answered."""
        self._call = StoreCall(self._clock.now_s(), items)
        try:
            yield
        finally:
            self._call = None

    def _run_task(self, task: StoreTask) -> None:
        if task.future.done() or not task.future.set_running_or_notify_cancel():
            return  # it was given up while it waited behind the group, or cancelled
        try:
            with self._during([task]):
                result = task.run()
        except Exception as fault:  # an outermost loop: the caller gets the error
            with suppress(InvalidStateError):  # it was given up meanwhile
                task.future.set_exception(fault)
        else:
            with suppress(InvalidStateError):
                task.future.set_result(result)

    def _commit(self, jobs: Sequence[Job]) -> None:
        now_s = self._clock.now_s()
        if now_s >= self._probe_due_s:
            jobs = [*jobs, Job(WriteCheck(), None)]
            self._probe_due_s = now_s + PROBE_S
        if not jobs:
            return
        answers: Sequence[Answer]
        try:
            now_us = self._now_us()
            with self._during(jobs):
                if not self._is_checked:
                    self._check()
                    self._is_checked = True
                committed = self._store.commit([job.entry for job in jobs], now_us=now_us)
            self._offset_us += max(0, committed.now_us - now_us)
            self._note(StoreHealth(writable=True, reason="ok"))
            answers = committed.outcomes
        except (StoreUnavailable, StoreRefused) as fault:
            self._note(StoreHealth(writable=False, reason=str(fault.__cause__ or fault)))
            self._probe_due_s = now_s + RETRY_S
            answers = [unavailable() for _ in jobs]  # each its own, for its traceback holds much
        except Exception as fault:  # an outermost loop: a bug in one entry must not end the thread
            log.exception("a group of %d entries could not be committed", len(jobs))
            if len(jobs) > 1:
                for job in jobs:  # one bad entry must not take its neighbours with it
                    self._commit([job])
                return
            answers = [fault.with_traceback(None)]  # it was logged, and leads back to the caller
        _answer(jobs, answers)

    def _now_us(self) -> int:
        return int(self._clock.now_s() * 1e6) + self._offset_us

    def _fail(self, running: Sequence[Item]) -> None:
        """Fail *running* and all that waits behind it."""
        items: list[Item] = list(running)
        stops = False
        while self._items:
            with suppress(IndexError):  # the other thread was quicker
                item = self._items.popleft()
                stops = stops or item is None
                items.append(item)
        if stops:
            self._items.append(None)
        jobs = [item for item in items if isinstance(item, Job)]
        _answer(jobs, [unavailable() for _ in jobs])
        for item in items:
            if isinstance(item, StoreTask):
                with suppress(InvalidStateError):  # it was done, or cancelled, just now
                    item.future.set_exception(unavailable())

    def _note(self, health: StoreHealth) -> None:
        if health.writable != self.health.writable:
            if health.writable:
                log.warning("the ledger can be written again")
            else:
                log.error("the ledger cannot be written: %s", health.reason)
        self.health = health


def _answer(jobs: Sequence[Job], answers: Sequence[Answer]) -> None:
    """Resolve the promises of *jobs*, waking each event loop once."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Promise, Answer]]] = {}
    for job, answer in zip(jobs, answers, strict=True):
        if job.promise is not None:
            by_loop.setdefault(job.promise.get_loop(), []).append((job.promise, answer))
    for loop, answered in by_loop.items():
        with suppress(RuntimeError):  # the loop was closed, so nothing waits any more
            loop.call_soon_threadsafe(_resolve, answered)


def _resolve(answered: Sequence[tuple[Promise, Answer]]) -> None:
    """On the event loop."""
    for promise, answer in answered:
        if promise.done():
            continue  # it was given up, and its call has come back since
        if isinstance(answer, Exception):
            promise.set_exception(answer)
        else:
            promise.set_result(answer)
