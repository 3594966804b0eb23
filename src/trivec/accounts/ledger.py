"""Usage ledger: what is written for each request, and the one thread that writes it.

All that a request asks of the store is an `Entry`. The writer's thread commits the entries that have
gathered as soon as it is free, and never waits for more: alone, an entry costs one commit; under
load, a group of them shares one. A `Transaction` decides a group in memory, the same for every store.
"""

import asyncio
import logging
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from threading import Event, Thread
from typing import NamedTuple, Protocol, TypeAlias

from trivec.accounts import rate_limits
from trivec.accounts.rate_limits import NOTHING, Bucket, Cost, Grant
from trivec.accounts.types import Key, RateLimits, StoreHealth, UsageLine, UsageQuery
from trivec.accounts.utc import DAY_US, MINUTE_US
from trivec.core.clock import resolve
from trivec.core.errors import FieldInvalid, RateLimitExceeded, StoreRefused, StoreUnavailable
from trivec.core.ports import Clock

CALL_S_MAX = 5.0  # a call to the store that takes longer counts as hanging
RETRY_AFTER_S = 2.0  # a store that came back is noticed within 1 s
ERROR_FROM = 400  # statuses from here on are failures
GROUP_MAX = 512  # entries of one commit
WAITING_MAX = 16_384  # entries; more than 1,024 connections can ever have waiting
IDLE_S = 5.0  # between two commits of an idle process, which so learns whether it can write
RETRY_S = 1.0  # between two tries while the store cannot be written
HANGS = f"a call to it has not come back within {CALL_S_MAX:g} s"
SLOW = "a call to it has not come back yet"
DIED = "the thread that writes the ledger has died"
log = logging.getLogger("trivec.accounts")


class LedgerRow(NamedTuple):
    """One authenticated request that is billed; the fields are the ledger's columns, in order."""

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


@dataclass(frozen=True, slots=True)
class Reserve:
    """Give back *unused*, then take *cost* out of a key's bucket, all of it or nothing.

    Where it is taken, what there is of *ahead* is taken too: see `leases`.
    """

    key_id: str
    limits: RateLimits
    cost: Cost
    ahead: Cost = NOTHING
    unused: Cost = NOTHING


@dataclass(frozen=True, slots=True)
class RecordUsage:
    """Record a request, and give back what it did not use of its reservation."""

    row: LedgerRow
    limits: RateLimits | None = None  # None: its bucket stays as it is
    unused: Cost = NOTHING


Entry: TypeAlias = Reserve | RecordUsage
Granted: TypeAlias = Grant | None  # None: the entry touched no bucket
Outcome: TypeAlias = Granted | RateLimitExceeded
Answer: TypeAlias = Outcome | Exception


@dataclass(frozen=True, slots=True)
class Committed:
    """One outcome an entry, in their order, and the instant at which they were decided."""

    outcomes: Sequence[Answer]
    now_us: int


class Transaction:
    """One group of entries, decided in order over the buckets that they touch. No clock, no SQL.

    A store reads and locks the buckets of `keys_touched`, writes what the group has changed, and
    commits.
    """

    def __init__(
        self, entries: Sequence[Entry], *, now_us: int, buckets: Mapping[str, Bucket]
    ) -> None:
        # Another machine's clock may be ahead of ours: then its last instant is ours too.
        now_us = max([now_us, *(bucket.at_us for bucket in buckets.values())])
        self._buckets = dict(buckets)
        self.buckets: dict[str, Bucket] = {}  # those that have changed
        self.rows: list[LedgerRow] = []
        self.counts: Counter[Count] = Counter()
        self.totals: dict[KeyDay, list[int]] = {}  # requests, failed ones, tokens
        self.committed = Committed([self._apply(entry, now_us) for entry in entries], now_us)

    def _apply(self, entry: Entry, now_us: int) -> Outcome:
        """Decide one entry."""
        match entry:
            case Reserve(key_id, limits, cost, ahead, unused):
                found = self._buckets.get(key_id, Bucket())
                if unused != NOTHING:
                    found = rate_limits.give_back(found, limits, unused, now_us=now_us)
                    self._buckets[key_id] = self.buckets[key_id] = found
                reserved = rate_limits.reserve(found, limits, cost, now_us=now_us)
                if isinstance(reserved, RateLimitExceeded):
                    return reserved
                grant = Grant(reserved)
                if ahead != NOTHING:
                    grant = rate_limits.reserve_ahead(reserved, limits, ahead)
            case RecordUsage(row, limits, unused):
                key_id = row.key_id
                if row.token_count == 0:
                    minute = row.time_us // MINUTE_US
                    self.counts[Count(key_id, row.model, row.status, minute)] += 1
                else:
                    self.rows.append(row)
                day = KeyDay(key_id, row.model, row.time_us // DAY_US)
                requests, failed, tokens = self.totals.get(day, (0, 0, 0))
                failed += row.status >= ERROR_FROM
                self.totals[day] = [requests + 1, failed, tokens + row.token_count]
                if limits is None:
                    return None
                found = self._buckets.get(key_id, Bucket())
                grant = Grant(rate_limits.give_back(found, limits, unused, now_us=now_us))
        self._buckets[key_id] = self.buckets[key_id] = grant.bucket
        return grant


def keys_touched(entries: Iterable[Entry]) -> list[str]:
    """Ids of the keys whose bucket must be read and locked, in the order that all processes use."""
    touched = set()
    for entry in entries:
        if isinstance(entry, Reserve):
            touched.add(entry.key_id)
        elif entry.limits is not None:
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
        """Decide and write *entries* in order, all or none; durable when it returns.

        A store that nodes share commits reservations before the other entries: where one of those
        cannot be written, its outcome is the error, and all others stand. Without entries it writes
        something that is no usage, to find out whether it can.
        """
        ...

    def agree_secret_check(self, proposed: bytes) -> bytes:
        """The check of the server's secret: the first one that any process proposed."""
        ...

    def keys_since(self, revision: int) -> KeyChanges:
        """Keys that were made or changed after *revision*; 0 for all."""
        ...

    def find_keys(self, reference: str, digest: bytes) -> Sequence[Key]:
        """The keys with this id, name or *digest*, revoked ones too."""
        ...

    def count_live_keys(self) -> int:
        """How many keys are not revoked."""
        ...

    def add_key(self, key: Key) -> None:
        """Raises `FieldInvalid` when a key that is not revoked has this name."""
        ...

    def change_key(self, key_id: str, change: Callable[[Key], Key]) -> Key:
        """Replace a key by the result of *change*, which is pure; no other change comes between."""
        ...

    def usage(self, query: UsageQuery) -> list[UsageLine]:
        """Sums over the ledger, ordered by group; with the names of its keys where it is by key."""
        ...

    def listen(self, heard: Callable[[], None], is_over: Event) -> None:
        """Call *heard* soon after any process has changed a key, until *is_over*.

        It reconnects by itself; `interrupt` wakes it up. Without notices it returns at once.
        """
        ...

    def interrupt(self) -> None:
        """Interrupt the calls of other threads: they raise `StoreUnavailable`.

        An interrupted commit may be durable all the same. It never blocks, and does nothing where
        calls cannot be interrupted, as with a disk that hangs.
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


class PendingEntry(asyncio.Future[Granted]):
    """An entry on its way to the store, and then its result.

    An entry that was handed over is committed, so this cannot be cancelled: a task that is cancelled
    while it waits for it goes on waiting, and raises `CancelledError` when it is done.
    """

    def __init__(self, entry: Entry, *, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop=loop)
        self.entry = entry

    def cancel(self, msg: object = None) -> bool:
        return False


Group: TypeAlias = Sequence[PendingEntry]


class LedgerWriter:
    """The thread that commits entries, owned by `Accounts`. Only `stop` blocks.

    Its time for buckets is the monotonic clock, set by the wall clock at the start, and moved on
    where a bucket was written later: by another machine, or before the wall clock was set back. So a
    wall clock that is set by hand neither refills buckets while we run nor ever blocks a key.
    """

    def __init__(
        self, store: Store, *, clock: Clock, check: Callable[[], None], idle_s: float = IDLE_S
    ) -> None:
        """*check* raises `StoreRefused` for a store that must not be written; run until it passes."""
        self.health = StoreHealth(writable=True, reason="ok")
        self.died: Future[str] = Future()  # why the thread has died, if it has
        self.busy_since_s: float | None = None  # when the running commit began; None: none runs
        self.is_slow = False  # the running commit is late
        self._store = store
        self._check = check
        self._is_checked = False
        self._clock = clock
        self._offset_us = int((clock.wall_s() - clock.now_s()) * 1e6)
        self._idle_s = idle_s
        self._due_s = clock.now_s()  # of the next commit, even of nothing
        self._waiting: deque[PendingEntry] = deque()
        self._wake = Event()
        self._group: list[PendingEntry] = []  # what the thread commits now
        self._last: Sequence[Entry] = ()
        self._is_stopping = False
        self._thread = Thread(target=self._run, name="trivec-ledger", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, last: Sequence[Entry] = ()) -> None:
        """Write what was handed over and then *last*, whose outcomes nobody waits for, and end.

        Nothing may be handed over afterwards.
        """
        self._last = last
        self._is_stopping = True
        self._wake.set()
        self._thread.join()

    def submit(self, entry: Entry) -> PendingEntry:
        """Have *entry* committed; called on an event loop, which is woken once for a whole group.

        The result may be `RateLimitExceeded` or `StoreUnavailable`, raised.
        """
        loop = asyncio.get_running_loop()
        pending = PendingEntry(entry, loop=loop)
        if len(self._waiting) >= WAITING_MAX or self.died.done():
            pending.set_exception(unavailable())
            return pending
        self._waiting.append(pending)
        if len(self._waiting) == 1:  # at the end of the loop's turn: its other ready tasks join
            loop.call_soon(self._wake.set)
        return pending

    def now_us(self) -> int:
        """The time that buckets go by."""
        return int(self._clock.now_s() * 1e6) + self._offset_us

    def suspect(self, *, since_s: float | None) -> None:
        """Let nothing more in until the commit begun at *since_s* has come back, or another."""
        if self.busy_since_s == since_s:
            self.is_slow = True
            if self.health.writable:
                self._note(StoreHealth(writable=False, reason=SLOW))

    def give_up(self, *, since_s: float | None) -> None:
        """Fail everything that waits with `StoreUnavailable`: the commit begun at *since_s* hangs.

        On any thread. The result of that commit is dropped, but it stands if it was made.
        """
        group = self._group
        if self.busy_since_s == since_s:  # else it came back just now
            self._note(StoreHealth(writable=False, reason=HANGS))
            self._fail(group)

    def _run(self) -> None:
        try:
            while self._waiting or not self._is_stopping:
                if not self._waiting:
                    self._wake.wait(min(max(0.0, self._due_s - self._clock.now_s()), self._idle_s))
                self._wake.clear()
                with suppress(IndexError):  # none is left; `give_up` takes them too
                    while len(self._group) < GROUP_MAX:
                        self._group.append(self._waiting.popleft())
                if self._group or self._clock.now_s() >= self._due_s:
                    self._commit(self._group)
                self._group = []
            if self._last and self.health.writable:
                self.busy_since_s = self._clock.now_s()  # it is given up, too, where it hangs
                with suppress(StoreUnavailable):
                    self._store.commit(self._last, now_us=self.now_us())
                self.busy_since_s = None
        except BaseException as fault:
            # `_commit` catches what entries raise, so this is our own bug: the process refuses what
            # would be unmetered, and is to be restarted.
            log.critical("%s", DIED, exc_info=fault)
            self._note(StoreHealth(writable=False, reason=DIED))
            self.died.set_result(f"{DIED}: {type(fault).__name__}")
            self._fail(self._group)

    def _commit(self, group: Group) -> None:
        began_s = self.busy_since_s = self._clock.now_s()
        self._due_s = began_s + self._idle_s
        now_us = self.now_us()
        answers: Sequence[Answer]
        try:
            if not self._is_checked:
                self._check()
                self._is_checked = True
            committed = self._store.commit([one.entry for one in group], now_us=now_us)
        except (StoreUnavailable, StoreRefused) as fault:
            self._note(StoreHealth(writable=False, reason=str(fault.__cause__ or fault)))
            self._due_s = began_s + RETRY_S
            answers = [unavailable() for _ in group]  # each its own, for its traceback holds much
        except Exception as fault:  # an outermost loop: a bug in one entry must not end the thread
            log.exception("a group of %d entries could not be committed", len(group))
            if len(group) > 1:
                for one in group:  # one bad entry must not take its neighbours with it
                    self._commit([one])
                return
            # Without what leads back to its caller; it was logged. Nobody waits for an idle check.
            answers = [fault.with_traceback(None)] * len(group)
        else:
            # Not from *now_us*: what others wrote while this waited for its turn is no later than now.
            self._offset_us += max(0, committed.now_us - self.now_us())
            if not self.health.writable:
                self._note(StoreHealth(writable=True, reason="ok"))
            answers = committed.outcomes
        finally:
            self.busy_since_s, self.is_slow = None, False
        resolve(zip(group, answers, strict=True))

    def _fail(self, group: Group) -> None:
        """Fail *group* and all that waits behind it."""
        failed = list(group)
        with suppress(IndexError):
            while True:
                failed.append(self._waiting.popleft())
        resolve([(pending, unavailable()) for pending in failed])

    def _note(self, health: StoreHealth) -> None:
        if health.writable:
            log.warning("the ledger can be written again")
        elif self.health.writable:
            log.error("the ledger cannot be written: %s", health.reason)
        self.health = health
