"""Books that are gone with the process: for tests, and the plain twin of the SQL stores."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from threading import Lock

from trivec.accounts.allowance import MINUTE_US, Bucket
from trivec.accounts.entries import Claim, ClaimName, Committed, Count, Entry, LedgerRow, Upkeep
from trivec.accounts.page import CLAIM_HELD_US, Page, Total
from trivec.accounts.store import KeyChanges, name_taken, unavailable
from trivec.accounts.types import Key, UsageBy, UsageLine, UsageQuery
from trivec.accounts.utc import day
from trivec.core.errors import ResourceUnknown


class MemoryStore:
    """`broken` makes it refuse, as a full disk would."""

    def __init__(self) -> None:
        self.broken = False
        self.rows: list[LedgerRow] = []
        self.counts: Counter[Count] = Counter()
        self._lock = Lock()
        self._buckets: dict[str, Bucket] = {}
        self._claims: dict[ClaimName, Claim] = {}
        self._keys: dict[str, Key] = {}
        self._revisions: dict[str, int] = {}
        self._offsets_us: dict[str, int] = {}
        self._secret_check: bytes | None = None

    def commit(self, entries: Sequence[Entry], *, now_us: int) -> Committed:
        with self._lock:
            self._check()
            page = Page(now_us=now_us, buckets=self._buckets, claims=self._claims)
            outcomes = [page.take(entry) for entry in entries]
            self._buckets.update(page.buckets_changed)
            for name, claim in page.claims_changed.items():
                if claim is None:
                    self._claims.pop(name, None)
                else:
                    self._claims[name] = claim
            if page.upkeep is not None:
                self._keep_up(page.upkeep, now_us=page.now_us)
            self.rows.extend(page.rows)
            self.counts.update(page.counts)
        return Committed(outcomes, page.now_us)

    def _keep_up(self, upkeep: Upkeep, *, now_us: int) -> None:
        for name, claim in list(self._claims.items()):
            if now_us >= claim.expires_us:
                del self._claims[name]
            elif claim.owner == upkeep.owner and not claim.done:
                self._claims[name] = replace(claim, held_until_us=now_us + CLAIM_HELD_US)

    def _check(self) -> None:
        if self.broken:
            raise unavailable() from OSError("the store in memory was broken on purpose")

    def agree_offset_us(self, boot_id: str, *, proposed_us: int) -> int:
        return self._offsets_us.setdefault(boot_id, proposed_us)

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

    def _put_key(self, key: Key) -> Key:
        self._keys[key.id] = key
        self._revisions[key.id] = max([0, *self._revisions.values()]) + 1
        return key

    def usage(self, query: UsageQuery) -> list[UsageLine]:
        groups: dict[str | None, Total] = {}

        def add(one: LedgerRow | Count, time_us: int, requests: int, tokens: int) -> None:
            if _asked_for(one.key_id, time_us, query):
                group = _group(one, time_us, query.by)
                total = groups.setdefault(group, Total())
                total.add(requests, status=one.status, tokens=tokens)

        with self._lock:
            for row in self.rows:
                add(row, row.time_us, 1, row.token_count)
            for count, requests in self.counts.items():
                add(count, count.minute * MINUTE_US, requests, 0)
        return [
            UsageLine(group, None, total.requests, total.failed, total.tokens)
            for group, total in sorted(groups.items(), key=lambda item: item[0] or "")
        ]

    def interrupt(self) -> None:
        pass

    def close(self) -> None:
        pass


def _asked_for(key_id: str, time_us: int, query: UsageQuery) -> bool:
    return (
        (query.since_us is None or time_us >= query.since_us)
        and (query.until_us is None or time_us < query.until_us)
        and (query.key_id is None or key_id == query.key_id)
    )


def _group(one: LedgerRow | Count, time_us: int, by: UsageBy) -> str | None:
    match by:
        case UsageBy.KEY:
            return one.key_id
        case UsageBy.MODEL:
            return one.model
        case UsageBy.DAY:
            return day(time_us)
