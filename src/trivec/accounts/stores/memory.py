"""Store in memory, gone with the process: for tests, for `no_auth`, and to compare the SQL stores with."""

from collections import Counter
from collections.abc import Callable, Sequence
from threading import Lock

from trivec.accounts.ledger import (
    Committed,
    Count,
    Entry,
    KeyChanges,
    LedgerRow,
    Total,
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
        self._revisions: dict[str, int] = {}
        self._secret_check: bytes | None = None

    def commit(self, entries: Sequence[Entry], *, now_us: int) -> Committed:
        with self._lock:
            self._check()
            transaction = Transaction(now_us=now_us, buckets=self._buckets)
            outcomes = [transaction.apply(entry) for entry in entries]
            self._buckets.update(transaction.buckets_changed)
            self.rows.extend(transaction.rows)
            self.counts.update(transaction.counts)
        return Committed(outcomes, transaction.now_us)

    def agree_secret_check(self, proposed: bytes) -> bytes:
        self._secret_check = self._secret_check or proposed
        return self._secret_check

    def keys_since(self, revision: int) -> KeyChanges:
        with self._lock:
            self._check()
            changed = tuple(self._keys[k] for k, at in self._revisions.items() if at > revision)
            return KeyChanges(max([revision, *self._revisions.values()]), changed)

    def add_key(self, key: Key) -> None:
        with self._lock:
            self._check()
            if any(k.name == key.name and k.revoked_us is None for k in self._keys.values()):
                raise name_taken(key.name)
            self._put_key(key)

    def change_key(self, key_id: str, change: Callable[[Key], Key]) -> Key:
        with self._lock:
            self._check()
            if key_id not in self._keys:
                raise ResourceUnknown(f"There is no key {key_id}.")
            return self._put_key(change(self._keys[key_id]))

    def usage(self, query: UsageQuery) -> list[UsageLine]:
        totals: dict[str | None, Total] = {}

        def add(one: LedgerRow | Count, time_us: int, requests: int, tokens: int) -> None:
            if (
                (query.since_us is not None and time_us < query.since_us)
                or (query.until_us is not None and time_us >= query.until_us)
                or (query.key_id is not None and one.key_id != query.key_id)
            ):
                return
            match query.by:
                case UsageBy.KEY:
                    group: str | None = one.key_id
                case UsageBy.MODEL:
                    group = one.model
                case UsageBy.DAY:
                    group = day(time_us // DAY_US)
            totals.setdefault(group, Total()).add(requests, status=one.status, tokens=tokens)

        with self._lock:
            for row in self.rows:
                add(row, row.time_us, 1, row.token_count)
            for count, requests in self.counts.items():
                add(count, count.minute * MINUTE_US, requests, 0)
        return [
            UsageLine(group, None, total.requests, total.failed, total.tokens)
            for group, total in sorted(totals.items(), key=lambda item: item[0] or "")
        ]

    def interrupt(self) -> None:
        pass

    def close(self) -> None:
        pass

    def _check(self) -> None:
        if self.broken:
            raise unavailable() from OSError("the store in memory was broken on purpose")

    def _put_key(self, key: Key) -> Key:
        self._keys[key.id] = key
        self._revisions[key.id] = max([0, *self._revisions.values()]) + 1
        return key
