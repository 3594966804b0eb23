"""The door of the room: who is this, may it, and what did it come to. Called on the event loop.

It waits for the writer's thread and for a reader's thread, and touches no store itself.
"""

import asyncio
import hmac
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from trivec.accounts import keys
from trivec.accounts.administration import FIXED_KEY_ID, OVERLAP_S, Administration
from trivec.accounts.booking import Booking, MeteredBooking
from trivec.accounts.desk import Desk
from trivec.accounts.keyring import Keyring
from trivec.accounts.store import Store
from trivec.accounts.types import (
    Caller,
    Key,
    KeyPlan,
    NewKey,
    Opening,
    Scope,
    StoreHealth,
    UsageLine,
    UsageQuery,
)
from trivec.accounts.writer import Writer
from trivec.core.errors import KeyMissing, StoreUnavailable
from trivec.core.ports import Clock

ANONYMOUS = Caller("anonymous", "anonymous", frozenset(Scope))
FIXED = Caller(FIXED_KEY_ID, FIXED_KEY_ID, frozenset(Scope))
FIXED_KEY_CHARS_MIN = 16
T = TypeVar("T")


class Accounts:
    """Owns the store and two threads; `start` before use, `stop` at the end."""

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
        self._secret = secret
        self._fixed = None if fixed_key is None else keys.digest(fixed_key, secret=secret)
        self._no_auth = no_auth
        self._writer = Writer(store, clock=clock)
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="trivec-keys")
        self._keyring = Keyring(store.keys_since, reader=self._reader, clock=clock, secret=secret)
        self._desk = Desk(self._writer, clock=clock, secret=secret)
        self._administration = Administration(store, clock=clock, secret=secret)

    def start(self) -> None:
        self._writer.start()

    def stop(self) -> None:
        """Write what is on its way, then let go of the store. Blocks for as long as that takes."""
        self._writer.stop()
        self._reader.shutdown()
        self._store.close()

    def health(self) -> StoreHealth:
        """Whether the ledger could be written when last tried; tried every 5 s, 1 s when broken."""
        return self._writer.health

    def writable(self) -> bool:
        return self._no_auth or self._writer.health.writable

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
        return await self._keyring.find(bearer)

    def book(self, caller: Caller, opening: Opening) -> Booking:
        """A booking for one request, which holds nothing yet; to be closed whatever happens."""
        if caller is ANONYMOUS:
            return Booking()
        return MeteredBooking(caller, opening, desk=self._desk)

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
        return await self._read(lambda: self._administration.usage(query))

    async def _change(self, errand: Callable[[], T]) -> T:
        """In the writer's thread, and known to this process at once."""
        try:
            return await asyncio.wrap_future(self._writer.call(errand))
        finally:
            self._keyring.distrust()

    async def _read(self, errand: Callable[[], T]) -> T:
        """Off the reader's own thread: a long sum must not keep keys from being checked."""
        return await asyncio.to_thread(errand)
