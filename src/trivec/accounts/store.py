"""The seam to what keeps the books. `tests/contract/test_store.py` runs against every one of them.

All methods block. `commit` is called by one thread, the others by any. Each raises
`StoreUnavailable`, with the store's own words as its cause, when it cannot read or write.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from trivec.accounts.entries import Committed, Entry
from trivec.accounts.types import Key, UsageLine, UsageQuery
from trivec.core.errors import FieldInvalid, StoreUnavailable

CALL_S_MAX = 5.0  # a commit, or a read of keys, that takes longer hangs
RETRY_AFTER_S = 2.0  # a store that came back is seen within 1 s


@dataclass(frozen=True, slots=True)
class KeyChanges:
    """Every key that changed after some revision, and the revision they lead to."""

    revision: int
    keys: tuple[Key, ...]


class Store(Protocol):
    """Keys, buckets, claims and the ledger."""

    def commit(self, entries: Sequence[Entry], *, now_us: int) -> Committed:
        """Decide and write *entries* in order, all or none; durable when it returns."""
        ...

    def agree_offset_us(self, boot_id: str, *, proposed_us: int) -> int:
        """The timeline's offset for this boot: the first one that any process proposed."""
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
        """Replace a key by what *change*, which is pure, makes of it; no other change between."""
        ...

    def usage(self, query: UsageQuery) -> list[UsageLine]:
        """Sums over the ledger, ordered by group; names are filled in by whoever asks."""
        ...

    def interrupt(self) -> None:
        """Break off the calls that other threads are in: they raise `StoreUnavailable`.

        A commit may have become durable all the same. It never blocks, and where nothing can be
        broken off, as with a disk that hangs, it does nothing.
        """
        ...

    def close(self) -> None:
        """Let go of files and connections; the store is not used again."""
        ...


def name_taken(name: str) -> FieldInvalid:
    return FieldInvalid(f"There is a key named {name} already; choose another.", param="name")


def unavailable() -> StoreUnavailable:
    """What a client is told, whatever the store's own words were."""
    return StoreUnavailable(
        "Usage cannot be recorded right now, so nothing is served. Please try again in "
        f"{RETRY_AFTER_S:.0f} s.",
        retry_after_s=RETRY_AFTER_S,
    )
