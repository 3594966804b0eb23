"""Every live key by its digest, never older than half a second: how a bearer becomes a `Caller`.

A look-up touches no store: one HMAC, one dictionary, one comparison in constant time, the same for
a near miss as for any stranger. Only what changed is read again.
"""

import asyncio
import hmac
from collections.abc import Callable
from concurrent.futures import Executor

from trivec.accounts import keys
from trivec.accounts.store import CALL_S_MAX, RETRY_AFTER_S, KeyChanges
from trivec.accounts.types import Caller, Key, Secret
from trivec.core.errors import KeyInvalid, StoreUnavailable
from trivec.core.ports import Clock

STALE_S = 0.5  # a revoked key opens nothing 1 s later, on any process; this leaves as much to spare
STRANGE_S = 0.2  # between reads for keys that are not known: a flood of them reads no faster
READ_S_MAX = CALL_S_MAX  # how long a request waits for the store to say whose key it is
NOBODY = bytes(32)  # what an unknown digest is compared with


class Keyring:
    """Lives on the event loop; reads the store on *reader*."""

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
        self._read_s: float | None = None
        self._distrusted = 0  # times
        self._reading: asyncio.Task[None] | None = None
        self._reading_since_s: float | None = None
        self._by_digest: dict[bytes, tuple[Key, Secret]] = {}
        self._digests: dict[str, tuple[bytes, ...]] = {}  # by key id

    async def find(self, bearer: str) -> Caller:
        """Raises `KeyInvalid` for a key that is unknown, revoked or expired; `StoreUnavailable`."""
        if len(bearer) > keys.BEARER_CHARS_MAX:
            raise KeyInvalid
        digest = keys.digest(bearer, secret=self._secret)
        asked_s = self._clock.now_s()
        if not self._is_fresh(asked_s - STALE_S):
            await self._freshen(asked_s - STALE_S)
        if digest not in self._by_digest:  # it may be new
            # Whoever repeats a wrong key is held to one answer a read, so that it takes no core from others.
            if self._read_s is not None and (early_s := self._read_s + STRANGE_S - asked_s) > 0:
                await asyncio.sleep(early_s)
            await self._freshen(asked_s)
        found = self._by_digest.get(digest)
        known = hmac.compare_digest(digest, NOBODY if found is None else found[1].digest)
        if not known or found is None:
            raise KeyInvalid
        now_us = int(self._clock.wall_s() * 1_000_000)
        if not (found[0].is_live(now_us) and found[1].is_live(now_us)):
            raise KeyInvalid
        return found[0].caller()

    def distrust(self) -> None:
        """What was read is out of date: read again before the next answer."""
        self._distrusted += 1
        self._read_s = None

    @property
    def reading_since_s(self) -> float | None:
        """When the read that is running began; None where none is."""
        return self._reading_since_s

    def _is_fresh(self, since_s: float) -> bool:
        return self._read_s is not None and self._read_s >= since_s

    async def _freshen(self, since_s: float) -> None:
        """Wait for a read that began at *since_s* or later; all who wait share one read at a time.

        What counts is the instant that the request asked, not the one that the read ended: a read
        may take longer than its result may be old. Raises `StoreUnavailable`, after `READ_S_MAX` too.
        """
        try:
            async with asyncio.timeout(READ_S_MAX):
                while not self._is_fresh(since_s):
                    if self._reading is None or self._reading.done():
                        self._reading = asyncio.create_task(self._read(), name="keys-read")
                        self._reading.add_done_callback(_retrieve)
                    reading = self._reading
                    try:
                        await asyncio.wait([reading])  # who leaves does not end others' read
                        if self._reading is reading:
                            self._reading = None
                        reading.result()
                    finally:
                        del reading  # with it, what it raises would hold itself and this request
        except TimeoutError:
            raise StoreUnavailable(
                f"The store has not said within {READ_S_MAX:g} s whose key this is, so nothing is "
                f"served. Please try again in {RETRY_AFTER_S:.0f} s.",
                retry_after_s=RETRY_AFTER_S,
            ) from None

    async def _read(self) -> None:
        started_s, distrusted = self._clock.now_s(), self._distrusted
        self._reading_since_s = started_s
        loop = asyncio.get_running_loop()
        try:
            changes = await loop.run_in_executor(self._reader, self._keys_since, self._revision)
        finally:
            self._reading_since_s = None
        for key in changes.keys:
            for digest in self._digests.pop(key.id, ()):
                del self._by_digest[digest]
            if key.revoked_us is None:
                self._digests[key.id] = tuple(secret.digest for secret in key.secrets)
                self._by_digest |= {secret.digest: (key, secret) for secret in key.secrets}
        self._revision = changes.revision
        self._read_s = started_s if distrusted == self._distrusted else None


def _retrieve(reading: "asyncio.Task[None]") -> None:
    """A fault that everybody has left is nobody's."""
    if not reading.cancelled():
        reading.exception()
