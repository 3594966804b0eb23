"""The door of the room: who is this, may it, and what did it come to. Called on the event loop.

It waits for the threads that write, read and sum, and touches no store itself.
"""

import asyncio
import hmac
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Event, Thread
from typing import TypeVar

from trivec.accounts import keys
from trivec.accounts.administration import FIXED_KEY_ID, OVERLAP_S, Administration
from trivec.accounts.booking import MeteredReservation, Reservation
from trivec.accounts.desk import Desk
from trivec.accounts.keyring import Keyring
from trivec.accounts.secret import check_secret
from trivec.accounts.store import CALL_S_MAX, Store, unavailable
from trivec.accounts.types import (
    Caller,
    Key,
    KeyPlan,
    NewKey,
    RequestMeta,
    Scope,
    StoreHealth,
    UsageLine,
    UsageQuery,
)
from trivec.accounts.writer import HANGS, Writer
from trivec.core.errors import KeyMissing, Overloaded, StoreUnavailable
from trivec.core.ports import Clock

ANONYMOUS = Caller("anonymous", "anonymous", frozenset(Scope))
FIXED = Caller(FIXED_KEY_ID, FIXED_KEY_ID, frozenset(Scope))
FIXED_KEY_CHARS_MIN = 16
LOOK_S = 0.25  # between two looks for a call to the store that hangs
SUMS_MAX = 16  # the one that runs and those that wait for it
SUMS_RETRY_AFTER_S = 5.0
T = TypeVar("T")


class Accounts:
    """Owns the store and three threads; `start` before use, `stop` at the end."""

    def __init__(
        self,
        store: Store,
        *,
        clock: Clock,
        secret: bytes,
        fixed_key: str | None = None,
        no_auth: bool = False,
    ) -> None:
        assert fixed_key is None or len(fixed_key) >= FIXED_KEY_CHARS_MIN
        self._store = store
        self._clock = clock
        self._secret = secret
        self._fixed = None if fixed_key is None else keys.digest(fixed_key, secret=secret)
        self._no_auth = no_auth
        check = (lambda: None) if no_auth else partial(check_secret, store, secret)
        self._writer = Writer(store, clock=clock, check=check)
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="trivec-keys")
        self._keyring = Keyring(store.keys_since, reader=self._reader, clock=clock, secret=secret)
        self._over = Event()
        self._watch = Thread(target=self._watch_store, name="trivec-store-watch", daemon=True)
        self._summer = ThreadPoolExecutor(1, thread_name_prefix="trivec-usage")
        self._sums_asked = 0
        self._desk = Desk(self._writer, clock=clock, secret=secret)
        self._administration = Administration(store, clock=clock, secret=secret)

    def start(self) -> None:
        self._writer.start()
        self._watch.start()

    def stop(self) -> None:
        """Write what is on its way, then let go of the store. Blocks for as long as that takes."""
        self._summer.shutdown(wait=False, cancel_futures=True)  # nothing is lost with a sum
        self._writer.stop()
        self._reader.shutdown()
        self._over.set()
        self._watch.join()
        self._store.close()

    def health(self) -> StoreHealth:
        """Whether the ledger could be written when last tried; tried every 5 s, 1 s when broken."""
        if self._hangs():
            return StoreHealth(writable=False, reason=HANGS)
        return self._writer.health

    def writable(self) -> bool:
        return self._no_auth or self.health().writable

    async def identify(self, bearer: str | None) -> Caller:
        """The caller whose key *bearer* is; None when no Authorization header came.

        Raises `KeyMissing`, `KeyInvalid`, `StoreUnavailable`.
        """
        if self._no_auth:
            return ANONYMOUS
        if bearer is None:
            raise KeyMissing
        if self._fixed is not None and len(bearer) <= keys.BEARER_CHARS_MAX:
            digest = keys.digest(bearer, secret=self._secret)
            if hmac.compare_digest(digest, self._fixed):
                return FIXED
        if self._hangs():
            raise unavailable()  # at once: it would wait for a read that does not come back
        return await self._keyring.find(bearer)

    def reserve(self, caller: Caller, opening: RequestMeta) -> Reservation:
        """A booking for one request, which holds nothing yet; to be closed whatever happens."""
        if caller is ANONYMOUS:
            return Reservation()
        return MeteredReservation(caller, opening, desk=self._desk)

    async def create_first_key(self) -> NewKey | None:
        """The key to print at the first start; None where there is one, or none is needed.

        None too while the store is away: whoever brings it back makes a key by command.
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
        return await self._read(self._administration.list_keys)

    async def show_key(self, reference: str) -> Key:
        return await self._read(lambda: self._administration.show_key(reference))

    async def revoke_key(self, reference: str) -> Key:
        return await self._change(lambda: self._administration.revoke_key(reference))

    async def rotate_key(self, reference: str, *, overlap_s: float = OVERLAP_S) -> NewKey:
        return await self._change(
            lambda: self._administration.rotate_key(reference, overlap_s=overlap_s)
        )

    async def usage(self, query: UsageQuery) -> list[UsageLine]:
        """Sums over the ledger, one at a time in a thread of their own. Raises `Overloaded`."""
        if self._sums_asked >= SUMS_MAX:
            raise Overloaded(
                f"{self._sums_asked} sums over the ledger are asked for; at most {SUMS_MAX} "
                f"wait at a time. Please try again in {SUMS_RETRY_AFTER_S:.0f}s.",
                retry_after_s=SUMS_RETRY_AFTER_S,
            )
        self._sums_asked += 1
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._summer, self._administration.usage, query)
        finally:
            self._sums_asked -= 1

    async def _change(self, errand: Callable[[], T]) -> T:
        """In the writer's thread, and known to this process at once."""
        try:
            return await asyncio.wrap_future(self._writer.call(errand))
        finally:
            self._keyring.distrust()

    def _watch_store(self) -> None:
        """In a thread of its own, for the others may be the ones that wait."""
        while not self._over.wait(LOOK_S):
            if not self._hangs():
                continue
            since_s = self._writer.busy_since_s
            if since_s is not None and self._is_late(since_s):
                self._writer.give_up(since_s=since_s)
            self._store.interrupt()

    def _hangs(self) -> bool:
        return self._is_late(self._writer.busy_since_s) or self._is_late(
            self._keyring.reading_since_s
        )

    def _is_late(self, since_s: float | None) -> bool:
        return since_s is not None and self._clock.now_s() - since_s >= CALL_S_MAX

    async def _read(self, errand: Callable[[], T]) -> T:
        """Off the reader's own thread: a long list must not keep keys from being checked."""
        return await asyncio.to_thread(errand)
