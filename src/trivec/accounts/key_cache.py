"""Key cache: every live key by its digest, at most half a second old.

A look-up touches no store: one HMAC, one dictionary, one comparison in constant time, the same for
an unknown key as for a near miss. Only keys that have changed are read again.
"""

import asyncio
import hmac
from collections.abc import Callable
from concurrent.futures import Executor
from math import inf
from typing import NamedTuple

from trivec.accounts import keys
from trivec.accounts.ledger import CALL_S_MAX, KeyChanges, unavailable
from trivec.accounts.types import Key
from trivec.core.errors import KeyInvalid
from trivec.core.ports import Clock

STALE_S = 0.5  # a revoked key is refused within 1 s by every process; this leaves as much to spare
UNKNOWN_KEY_S = 0.2  # between reads for unknown keys, so that a flood of them reads no faster
READ_S_MAX = CALL_S_MAX  # how long a request waits for the store


class CachedSecret(NamedTuple):
    """One secret of a live key."""

    digest: bytes
    key: Key | None
    expires_us: float  # the key or this secret of it, whichever is first


UNKNOWN = CachedSecret(bytes(32), None, 0)  # what an unknown key is compared with


class KeyCache:
    """Used on the event loop; reads the store on *reader*."""

    def __init__(
        self,
        keys_since: Callable[[int], KeyChanges],
        *,
        reader: Executor,
        clock: Clock,
        secret: bytes,
    ) -> None:
        self._keys_since = keys_since
        self._reader = reader
        self._clock = clock
        self._secret = secret
        self._revision = 0
        self._read_s = -inf  # when the read began that the cache is from
        self._invalidations = 0
        self._reading: asyncio.Task[None] | None = None
        self._by_digest: dict[bytes, CachedSecret] = {}
        self._digests: dict[str, tuple[bytes, ...]] = {}  # by key id
        self.busy_since_s: float | None = None  # when the running read began; None: none runs

    async def find(self, bearer: str) -> Key:
        """Raises `KeyInvalid` for a key that is unknown, revoked or expired; `StoreUnavailable`."""
        if len(bearer) > keys.BEARER_CHARS_MAX:
            raise KeyInvalid
        digest = keys.digest(bearer, secret=self._secret)
        asked_s = self._clock.now_s()
        if self._read_s < asked_s - STALE_S:
            await self._refresh(asked_s - STALE_S)
        if digest not in self._by_digest and self._read_s < asked_s:  # it may be new
            # A client that repeats a wrong key gets one answer a read, so that it takes no core.
            if (early_s := self._read_s + UNKNOWN_KEY_S - asked_s) > 0:
                await asyncio.sleep(early_s)
            await self._refresh(asked_s)
        found = self._by_digest.get(digest, UNKNOWN)
        is_equal = hmac.compare_digest(digest, found.digest)
        is_over = self._clock.wall_s() * 1e6 >= found.expires_us
        if not is_equal or is_over or found.key is None:
            raise KeyInvalid
        return found.key

    def invalidate(self) -> None:
        """Read again before the next answer."""
        self._invalidations += 1
        self._read_s = -inf

    async def _refresh(self, since_s: float) -> None:
        """Wait for a read that began at *since_s* or later; all that wait share one read at a time.

        Freshness is measured from when the request asked, not from when the read ended: a read may
        take longer than its result may be old. Raises `StoreUnavailable`, after `READ_S_MAX` too.
        """
        began_s = self.busy_since_s
        if began_s is not None and self._clock.now_s() - began_s >= CALL_S_MAX:
            raise unavailable()  # at once: the read that all would share hangs
        try:
            async with asyncio.timeout(READ_S_MAX):
                while self._read_s < since_s:
                    if self._reading is None or self._reading.done():
                        self._reading = asyncio.create_task(self._read(), name="keys-read")
                        # An error that no request waits for any more is not reported.
                        self._reading.add_done_callback(
                            lambda read: read.cancelled() or read.exception()
                        )
                    reading = self._reading
                    try:
                        await asyncio.wait([reading])  # a request that leaves ends no shared read
                        if self._reading is reading:
                            self._reading = None
                        reading.result()
                    finally:
                        del reading  # else its error's traceback would hold itself and the request
        except TimeoutError:
            raise unavailable() from None

    async def _read(self) -> None:
        started_s, invalidations = self._clock.now_s(), self._invalidations
        self.busy_since_s = started_s
        loop = asyncio.get_running_loop()
        try:
            changes = await loop.run_in_executor(self._reader, self._keys_since, self._revision)
        finally:
            self.busy_since_s = None
        for key in changes.keys:
            for digest in self._digests.pop(key.id, ()):
                del self._by_digest[digest]
            if key.revoked_us is not None:
                continue
            self._digests[key.id] = tuple(secret.digest for secret in key.secrets)
            for secret in key.secrets:
                ends_us = [at for at in (key.expires_us, secret.expires_us) if at is not None]
                found = CachedSecret(secret.digest, key, min(ends_us, default=inf))
                self._by_digest[secret.digest] = found
        self._revision = changes.revision
        if invalidations == self._invalidations:
            self._read_s = started_s
