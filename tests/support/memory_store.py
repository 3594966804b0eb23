"""Store in memory, without SQL: the slow twin of the SQL store, and quick to make."""

from collections import Counter
from collections.abc import Callable, Sequence
from threading import Event, Lock

from trivec.accounts.ledger import (
    ERROR_FROM,
    Committed,
    Count,
    Entry,
    KeyChanges,
    LedgerRow,
    Transaction,
    name_taken,
    unavailable,
)
from trivec.accounts.rate_limits import Bucket
from trivec.accounts.types import Key, UsageBy, UsageLine, UsageQuery
from trivec.accounts.utc import DAY_US, MINUTE_US, day
from trivec.core.errors import ResourceUnknown


class MemoryStore:
    """`broken` makes it refuse, as a full disk would."""

    def __init__(self) -> None:
        self.broken = False
        self.rows: list[LedgerRow] = []
        self.counts: Counter[Count] = Counter()
        self._lock = Lock()
        self._buckets: dict[str, Bucket] = {}
        self._keys: dict[str, Key] = {}
        self._changed: list[str] = []  # ids, one a change: a revision is how many there were
        self._secret_check: bytes | None = None

    def commit(self, entries: Sequence[Entry], *, now_us: int) -> Committed:
        if self.broken:
            raise unavailable() from OSError("the store in memory was broken on purpose")
        with self._lock:
            transaction = Transaction(entries, now_us=now_us, buckets=self._buckets)
            self._buckets.update(transaction.buckets)
            self.rows.extend(transaction.rows)
            self.counts.update(transaction.counts)
        return transaction.committed

    def agree_secret_check(self, proposed: bytes) -> bytes:
        self._secret_check = self._secret_check or proposed
        return self._secret_check

    def keys_since(self, revision: int) -> KeyChanges:
        if self.broken:
            raise unavailable() from OSError("the store in memory was broken on purpose")
        with self._lock:
            changed = dict.fromkeys(self._changed[revision:])
            return KeyChanges(len(self._changed), tuple(self._keys[one] for one in changed))

    def find_keys(self, reference: str, digest: bytes) -> Sequence[Key]:
        return [
            key
            for key in self.keys_since(0).keys
            if reference in (key.id, key.name) or digest in {one.digest for one in key.secrets}
        ]

    def count_live_keys(self) -> int:
        return sum(key.revoked_us is None for key in self.keys_since(0).keys)

    def add_key(self, key: Key) -> None:
        with self._lock:
            if any(k.name == key.name and k.revoked_us is None for k in self._keys.values()):
                raise name_taken(key.name)
            self._put_key(key)

    def change_key(self, key_id: str, change: Callable[[Key], Key]) -> Key:
        with self._lock:
            if key_id not in self._keys:
                raise ResourceUnknown(f"There is no key {key_id}.")
            return self._put_key(change(self._keys[key_id]))

    def usage(self, query: UsageQuery) -> list[UsageLine]:
        with self._lock:
            used: list[tuple[LedgerRow | Count, int, int, int]]
            used = [(row, row.time_us, 1, row.token_count) for row in self.rows]
            used += [(one, one.minute * MINUTE_US, n, 0) for one, n in self.counts.items()]
        totals: dict[str | None, list[int]] = {}  # requests, failed ones, tokens
        for one, time_us, requests, tokens in used:
            if (
                (query.since_us is None or time_us >= query.since_us)
                and (query.until_us is None or time_us < query.until_us)
                and query.key_id in (None, one.key_id)
            ):
                groups = {UsageBy.KEY: one.key_id, UsageBy.MODEL: one.model}
                total = totals.setdefault(groups.get(query.by, day(time_us // DAY_US)), [0, 0, 0])
                failed = requests if one.status >= ERROR_FROM else 0
                for at, more in enumerate((requests, failed, tokens)):
                    total[at] += more
        names: dict[str | None, str] = {key.id: key.name for key in self._keys.values()}
        return [
            UsageLine(
                group, names.get(group, group or "") if query.by is UsageBy.KEY else None, *total
            )
            for group, total in sorted(totals.items(), key=lambda item: item[0] or "")
        ]

    def listen(self, heard: Callable[[], None], is_over: Event) -> None:
        pass

    def interrupt(self) -> None:
        pass

    def close(self) -> None:
        pass

    def _put_key(self, key: Key) -> Key:
        self._keys[key.id] = key
        self._changed.append(key.id)
        return key
