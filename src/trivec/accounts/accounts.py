"""Accounts: the callers' keys, rate limits and usage, as other packages use them.

Called on the event loop. Only the threads that write, read and sum use the store.
"""

import asyncio
import hmac
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Event, Thread
from typing import TypeVar

from trivec.accounts import keys, rate_limits
from trivec.accounts.administration import FIXED_KEY_ID, OVERLAP_S, Administration, check_secret
from trivec.accounts.key_cache import KeyCache
from trivec.accounts.leases import LEASE_US, Leases
from trivec.accounts.ledger import (
    CALL_S_MAX,
    ERROR_FROM,
    HANGS,
    IDLE_S,
    Entry,
    LedgerRow,
    LedgerWriter,
    PendingEntry,
    RecordUsage,
    Reserve,
    Store,
    unavailable,
)
from trivec.accounts.rate_limits import NOTHING, Cost
from trivec.accounts.types import (
    Key,
    KeyPlan,
    NewKey,
    RateLimits,
    RateLimitState,
    RequestMeta,
    RequestUsage,
    Scope,
    StoreHealth,
    UsageLine,
    UsageQuery,
)
from trivec.accounts.utc import SECOND_US
from trivec.core.errors import KeyMissing, Overloaded, RequestTooLarge, StoreUnavailable
from trivec.core.ports import Clock

UNLIMITED = RateLimits()
ANONYMOUS = Key("anonymous", "anonymous", frozenset(Scope), None, UNLIMITED, created_us=0)
FIXED = replace(ANONYMOUS, id=FIXED_KEY_ID, name=FIXED_KEY_ID)
FIXED_KEY_CHARS_MIN = 16
HANG_CHECK_S = 0.25  # between two checks for a call to the store that hangs
# A node that is cut off from a store that it shares is not ready within 2 s: the sum of these three.
SHARED_IDLE_S = 0.5
SHARED_CALL_S = 1.0  # a call that takes longer makes the node unready, though it may still succeed
SUMS_MAX = 16  # usage sums at a time: the running one and those that wait
SUMS_RETRY_AFTER_S = 5.0
OUR_FAULT_FROM = 500  # statuses from here on give the request back to the key
PLENTY_SHARE = 0.5
T = TypeVar("T")


class Accounts:
    """Owner of the store and of its threads; `start` before use, `stop` at the end."""

    def __init__(
        self,
        store: Store,
        *,
        clock: Clock,
        secret: bytes,
        fixed_key: str | None = None,
        no_auth: bool = False,
        shared: bool = False,
    ) -> None:
        """*shared*: other nodes use the store too, so rate limits are leased from it."""
        assert fixed_key is None or len(fixed_key) >= FIXED_KEY_CHARS_MIN
        self.clock = clock
        self.secret = secret
        self.writer = LedgerWriter(
            store,
            clock=clock,
            check=lambda: None if no_auth else check_secret(store, secret),
            idle_s=SHARED_IDLE_S if shared else IDLE_S,
        )
        self.leases = Leases() if shared else None
        self.expiry: asyncio.TimerHandle | None = None
        self.limits_seen: dict[str, RateLimitState] = {}  # by key id, when last asked
        self._store = store
        self._fixed = None if fixed_key is None else keys.digest(fixed_key, secret=secret)
        self._no_auth = no_auth
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="trivec-keys")
        self._keys = KeyCache(store.keys_since, reader=self._reader, clock=clock, secret=secret)
        self._is_over = Event()
        self._watch = Thread(target=self._watch_store, name="trivec-store-watch", daemon=True)
        # Keys are read again when a node has changed one; without such notices, twice a second.
        self._listener = Thread(
            target=lambda: store.listen(self._keys.invalidate, self._is_over),
            name="trivec-keys-listen",
            daemon=True,
        )
        self._usage_pool = ThreadPoolExecutor(1, thread_name_prefix="trivec-usage")
        self._sums = 0
        self._administration = Administration(store, clock=clock, secret=secret)

    def start(self) -> None:
        self.writer.start()
        self._watch.start()
        if self.leases is not None:
            self._listener.start()

    def stop(self) -> None:
        """Write what was handed over, then close the store. Blocks for as long as that takes."""
        self._usage_pool.shutdown(wait=False, cancel_futures=True)  # nothing is lost with a sum
        self.writer.stop([] if self.leases is None else self.leases.expire(now_us=sys.maxsize))
        self._reader.shutdown()
        self._is_over.set()
        self._watch.join()
        if self.leases is not None:
            self._store.interrupt()  # the listener waits for what may never come
            self._listener.join(CALL_S_MAX)
        self._store.close()

    def health(self) -> StoreHealth:
        """Whether the ledger could be written when last tried: every 5 s, or every 1 s if not."""
        if self._hangs():
            return StoreHealth(writable=False, reason=HANGS)
        return self.writer.health

    def writable(self) -> bool:
        return self._no_auth or self.health().writable

    async def lost(self) -> str:
        """Wait until the thread that writes the ledger has died, and return why.

        Only a bug of ours ends it. Nothing is served from then on: the process is to be restarted.
        """
        return await asyncio.shield(asyncio.wrap_future(self.writer.died))

    async def identify(self, bearer: str | None) -> Key:
        """The caller with the key *bearer*; None or empty when no Authorization header came.

        Raises `KeyMissing`, `KeyInvalid`, `StoreUnavailable`.
        """
        if self._no_auth:
            return ANONYMOUS
        if not bearer:  # empty as that of a variable that is not set: no key, and no wrong one
            raise KeyMissing
        if self._fixed is not None and len(bearer) <= keys.BEARER_CHARS_MAX:
            digest = keys.digest(bearer, secret=self.secret)
            if hmac.compare_digest(digest, self._fixed):
                return FIXED
        if self.writer.is_slow:  # the store hangs: reading keys would wait as long
            raise unavailable()
        return await self._keys.find(bearer)

    async def create_first_key(self) -> NewKey | None:
        """The key to print at the first start; None where there is one, or none is needed.

        None too while the store is away: an operator then makes one with `trivec keys create`.
        """
        if self._no_auth or self._fixed is not None:
            return None
        try:
            return await self._change(self._administration.create_first_key)
        except StoreUnavailable:
            return None

    async def create_key(self, plan: KeyPlan) -> NewKey:
        return await self._change(lambda: self._administration.create_key(plan))

    async def list_keys(self) -> list[Key]:
        # Not on the reader's thread: a long list must not keep keys from being checked.
        return await asyncio.to_thread(self._administration.list_keys)

    async def show_key(self, reference: str) -> Key:
        return await asyncio.to_thread(self._administration.show_key, reference)

    async def find_key(self, key_id: str) -> Key:
        """The key with this id, also one that is in no store. Raises `ResourceUnknown`."""
        for key in (ANONYMOUS, FIXED):
            if key_id == key.id:
                return key
        return await self.show_key(key_id)

    def pseudonym(self, user: str | None) -> str | None:
        """The digest under which the ledger has what a client calls its user."""
        if user is None:
            return None
        return keys.pseudonym(user, secret=self.secret, purpose="user").hex()

    async def revoke_key(self, reference: str) -> Key:
        return await self._change(lambda: self._administration.revoke_key(reference))

    async def rotate_key(self, reference: str, *, overlap_s: float = OVERLAP_S) -> NewKey:
        return await self._change(
            lambda: self._administration.rotate_key(reference, overlap_s=overlap_s)
        )

    async def usage(self, query: UsageQuery) -> list[UsageLine]:
        """Sums over the ledger, one at a time in a thread of their own. Raises `Overloaded`."""
        if self._sums >= SUMS_MAX:
            raise Overloaded(
                f"{self._sums} sums over the ledger are asked for; at most {SUMS_MAX} "
                f"wait at a time. Please try again in {SUMS_RETRY_AFTER_S:.0f}s.",
                retry_after_s=SUMS_RETRY_AFTER_S,
            )
        self._sums += 1
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._usage_pool, self._store.usage, query)
        finally:
            self._sums -= 1

    async def _change(self, change: Callable[[], T]) -> T:
        """Run *change* in a thread; this process sees its result at once.

        Raises `StoreUnavailable` where it takes too long; it may be made all the same.
        """
        if self.writer.died.done():
            raise unavailable()
        try:
            async with asyncio.timeout(CALL_S_MAX):
                return await asyncio.to_thread(change)
        except TimeoutError:
            raise unavailable() from None
        finally:
            self._keys.invalidate()

    def expire_leases(self) -> None:
        """Give back what is left of leases that are over, now and as long as there are leases."""
        assert self.leases is not None
        for unused in self.leases.expire(now_us=self.writer.now_us()):
            self.writer.submit(unused).add_done_callback(PendingEntry.exception)
        self.expiry = None
        if self.leases:
            loop = asyncio.get_running_loop()
            self.expiry = loop.call_later(LEASE_US / SECOND_US, self.expire_leases)

    def _watch_store(self) -> None:
        """Interrupt calls that hang. A thread of its own, since the others may hang in them."""
        while not self._is_over.wait(HANG_CHECK_S):
            since_s = self.writer.busy_since_s
            if self._hangs():
                if self._is_late(since_s, CALL_S_MAX):
                    self.writer.give_up(since_s=since_s)
                self._store.interrupt()
            elif self.leases is not None and self._is_late(since_s, SHARED_CALL_S):
                self.writer.suspect(since_s=since_s)

    def _hangs(self) -> bool:
        begun_s = self.writer.busy_since_s, self._keys.busy_since_s
        return any(self._is_late(since_s, CALL_S_MAX) for since_s in begun_s)

    def _is_late(self, since_s: float | None, after_s: float) -> bool:
        return since_s is not None and self.clock.now_s() - since_s >= after_s


class Reservation:
    """What one request has reserved of its key's rate limits, until its usage is recorded.

    It is closed in every case, whether the request was let in or not. A call that is cancelled while
    the store works ends when the store has answered, so that closing gives back what was taken.
    Requests of an anonymous caller are neither limited nor recorded.
    """

    def __init__(self, accounts: Accounts, caller: Key, meta: RequestMeta) -> None:
        self.state: RateLimitState | None = None  # None: the key has no limits, or not asked yet
        self._accounts = accounts
        self._caller = caller
        self._meta = meta
        self._is_let_in = False
        self._is_closed = caller is ANONYMOUS
        self._reserved = NOTHING
        self._owed = NOTHING  # let in, but not yet taken out of the bucket

    async def acquire(self, *, tokens_follow: bool = False) -> None:
        """Take one request out of the rate limit.

        *tokens_follow*: `reserve_tokens` will be called before any work is done, and may take the
        request with them, in one commit. Raises `RateLimitExceeded`, `StoreUnavailable`.
        """
        if self._caller is ANONYMOUS:
            return
        if not self._accounts.writer.health.writable:
            raise unavailable()
        if self._caller.limits != UNLIMITED:
            # Where this process last saw plenty left, the request is all but sure to be let in, and
            # need not be taken before its texts are tokenised.
            seen = self._accounts.limits_seen.get(self._caller.id)
            left = None if seen is None else seen.remaining_requests
            enough = (self._caller.limits.requests_per_minute or 0) * PLENTY_SHARE
            if tokens_follow and seen is not None and (left is None or left > enough):
                self._owed = Cost(requests=1)
            else:
                await self._take(Cost(requests=1))
        self._is_let_in = True

    async def reserve_tokens(self, count: int) -> None:
        """Take *count* tokens out of the rate limit, before any work is done on them.

        Where `acquire` left the request to be taken too, both or neither. Raises
        `RateLimitExceeded`; `RequestTooLarge` when a full bucket would not hold them;
        `StoreUnavailable`.
        """
        if self._caller.limits == UNLIMITED:
            return
        limit = self._caller.limits.tokens_per_minute
        if limit is not None and count > limit:
            raise RequestTooLarge(token_count=count, token_count_max=limit)
        cost = Cost(self._owed.requests, 0 if limit is None else count)
        if cost != NOTHING:
            await self._take(cost)

    async def close(self, usage: RequestUsage) -> None:
        """Record the request: its ledger row is durable when this returns. A failure costs zero.

        Once it is durable a success stands: a task that was cancelled meanwhile goes on, to deliver
        what is billed. Where we refused a request of a key without limits, its row is still on its
        way. Raises `StoreUnavailable`: then the client is told that. The failure of a request that
        was never let in stays that failure. A second call does nothing.
        """
        if self._is_closed:
            return
        self._is_closed = True
        writer, key_id = self._accounts.writer, self._caller.id
        limits = None if self._caller.limits == UNLIMITED else self._caller.limits
        is_success = usage.status < ERROR_FROM
        is_our_fault = usage.status >= OUR_FAULT_FROM
        if limits is not None and self._owed != NOTHING and not is_our_fault:
            # The request failed before it was taken, and stays that failure. This is not awaited:
            # entries are written in order, and a cancellation in between would lose the row.
            owed = writer.submit(Reserve(key_id, limits, self._owed))
            owed.add_done_callback(PendingEntry.exception)
        user = usage.user
        if user is not None:  # what the client chose to call its user is stored as a digest
            user = keys.pseudonym(user, secret=self._accounts.secret, purpose="user").hex()
        row = LedgerRow(
            time_us=int(self._accounts.clock.wall_s() * 1e6),
            request_id=self._meta.request_id,
            key_id=key_id,
            model=self._meta.model,
            input_count=usage.input_count,
            token_count=usage.token_count if is_success else 0,
            status=usage.status,
            duration_us=round(usage.duration_s * 1e6),
            user_digest=user,
        )
        unused = Cost(
            requests=self._reserved.requests if is_our_fault else 0,
            tokens=max(0, self._reserved.tokens - row.token_count),
        )
        if self.state is not None and unused == NOTHING:
            limits = None  # all that was reserved was used: its bucket is not touched again
        entry = RecordUsage(row, limits, unused)
        waits = not (writer.health.writable or writer.is_slow)  # it may just have come back
        if is_our_fault and not self._is_let_in and limits is None and not waits:
            # A refusal is cheap: it waits for no disk, and its row bills nothing.
            writer.submit(entry).add_done_callback(PendingEntry.exception)
            return
        try:
            await self._commit(entry)
        except StoreUnavailable:
            if self._is_let_in or is_success:
                raise

    async def _take(self, cost: Cost) -> None:
        """Reserve *cost*: out of what this node has leased, or else of the store."""
        accounts, caller = self._accounts, self._caller
        wanted = Reserve(caller.id, caller.limits, cost)
        if accounts.leases is None:
            await self._commit(wanted)
            return
        now_us = accounts.writer.now_us()
        asked = accounts.leases.take(wanted, now_us=now_us)
        if isinstance(asked, Reserve):
            if accounts.expiry is None:
                accounts.expire_leases()
            await self._commit(asked)
            return
        if (state := accounts.leases.state(caller.id, now_us=now_us)) is not None:
            self.state = accounts.limits_seen[caller.id] = state
        if asked is not None:
            raise asked
        self._reserved, self._owed = self._reserved.plus(cost), NOTHING

    async def _commit(self, entry: Entry) -> None:
        """Wait until *entry* is durable, and keep what it granted. Raises as the callers say."""
        pending = self._accounts.writer.submit(entry)
        task = asyncio.current_task()
        try:
            await pending
        except asyncio.CancelledError:
            is_billed = isinstance(entry, RecordUsage) and entry.row.status < ERROR_FROM
            if task is None or not is_billed or pending.exception() is not None:
                raise
            while task.uncancel():  # however often it was cancelled
                pass
        finally:  # also when the task was cancelled: the entry is done by then
            if pending.done():
                accounts, caller = self._accounts, self._caller
                grant = None if pending.exception() is not None else pending.result()
                if isinstance(entry, Reserve):
                    if grant is not None:
                        self._reserved, self._owed = self._reserved.plus(entry.cost), NOTHING
                    if accounts.leases is not None:
                        accounts.leases.put(entry, grant)
                if grant is not None:
                    state = rate_limits.state(grant.bucket, caller.limits)
                    if accounts.leases is not None:
                        now_us = accounts.writer.now_us()
                        state = accounts.leases.see(caller.id, grant.bucket, now_us=now_us) or state
                    self.state = accounts.limits_seen[caller.id] = state
            del pending  # else its error's traceback would hold itself and its callers' locals
