"""What one commit of the writer reads and writes, in statements that were compiled beforehand."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Dialect, Table, bindparam, delete, insert, select, update
from sqlalchemy.dialects import postgresql, sqlite

from trivec.accounts.allowance import Bucket
from trivec.accounts.entries import Claim, ClaimName, Upkeep
from trivec.accounts.page import CLAIM_HELD_US, Page
from trivec.accounts.stores import rows
from trivec.accounts.stores.compiled import Append, Compiled
from trivec.accounts.stores.schema import buckets, claims, counts, daily, ledger, timelines

OF_BUCKET = ("requests_debt", "tokens_debt", "at_us")
OF_CLAIM = ("body_digest", "owner", "held_until_us", "expires_us", "done", "token_count")

LOCK_BUCKET = (
    select(*(buckets.c[name] for name in OF_BUCKET))
    .where(buckets.c.key_id == bindparam("of_key"))
    .with_for_update()
)
WRITE_BUCKET = (
    update(buckets)
    .where(buckets.c.key_id == bindparam("of_key"))
    .values({name: bindparam(name) for name in OF_BUCKET})
)
OF_NAME = (claims.c.key_id == bindparam("of_key")) & (claims.c.digest == bindparam("of_digest"))
READ_CLAIM = select(*(claims.c[name] for name in OF_CLAIM)).where(OF_NAME)
DROP_CLAIM = delete(claims).where(OF_NAME)
MAKE_CLAIM = insert(claims).inline()
MARK_TIME = (
    update(timelines)
    .where(timelines.c.boot_id == bindparam("of_boot"))
    .values(seen_us=bindparam("seen_us"))
)
HOLD_CLAIMS = (
    update(claims)
    .where(claims.c.owner == bindparam("of_owner"), claims.c.done.is_(False))
    .values(held_until_us=bindparam("held_until_us"))
)
FORGET_CLAIMS = delete(claims).where(claims.c.expires_us <= bindparam("now_us"))


def _adding(table: Table, dialect: Dialect) -> Compiled:
    """A row, or what it holds beside its key added to the row that is there."""
    of_dialect = sqlite if dialect.name == "sqlite" else postgresql
    statement = of_dialect.insert(table).inline()
    key = [column.name for column in table.primary_key]
    sums = {c.name: c + statement.excluded[c.name] for c in table.c if c.name not in key}
    adding = statement.on_conflict_do_update(index_elements=key, set_=sums)
    return Compiled(adding, dialect, [*key, *sums])


class QuickStatements:
    """In one dialect; a cursor is the driver's own, inside a transaction."""

    def __init__(self, dialect: Dialect) -> None:
        self._lock_bucket = Compiled(LOCK_BUCKET, dialect, ["of_key"])
        self._write_bucket = Compiled(WRITE_BUCKET, dialect, ["of_key", *OF_BUCKET])
        self._append = Append(ledger, dialect, rows.LEDGER_NAMES)
        self._add_counts = _adding(counts, dialect)
        self._add_totals = _adding(daily, dialect)
        self._read_claim = Compiled(READ_CLAIM, dialect, ["of_key", "of_digest"])
        self._drop_claim = Compiled(DROP_CLAIM, dialect, ["of_key", "of_digest"])
        self._make_claim = Compiled(MAKE_CLAIM, dialect, ["key_id", "digest", *OF_CLAIM])
        self._mark_time = Compiled(MARK_TIME, dialect, ["of_boot", "seen_us"])
        self._hold_claims = Compiled(HOLD_CLAIMS, dialect, ["of_owner", "held_until_us"])
        self._forget_claims = Compiled(FORGET_CLAIMS, dialect, ["now_us"])

    def buckets(self, cursor: Any, key_ids: Sequence[str]) -> dict[str, Bucket]:
        """Locked one by one, in the order that all processes take."""
        return {
            key_id: Bucket(*row)
            for key_id in key_ids
            for row in self._lock_bucket.find(cursor, {"of_key": key_id})
        }

    def claims(self, cursor: Any, names: Sequence[ClaimName]) -> dict[ClaimName, Claim]:
        return {
            name: rows.claim_of(row)
            for name in names
            for row in self._read_claim.find(cursor, _of(name))
        }

    def write(self, cursor: Any, page: Page) -> None:
        """All that changed on *page*."""
        if page.buckets_changed:
            changed = page.buckets_changed.items()
            values = [rows.bucket_values(key, bucket) | {"of_key": key} for key, bucket in changed]
            self._write_bucket.run(cursor, values)
        if page.claims_changed:
            self._drop_claim.run(cursor, [_of(name) for name in page.claims_changed])
            claimed = page.claims_changed.items()
            made = [rows.claim_values(name, claim) for name, claim in claimed if claim is not None]
            if made:
                self._make_claim.run(cursor, made)
        if page.rows:
            self._append.run(cursor, [rows.ledger_values(row) for row in page.rows])
        # In one order: processes that add to the same rows would else wait for each other.
        if totals := page.totals():
            values = [rows.total_values(day, total) for day, total in totals.items()]
            self._add_totals.run(cursor, sorted(values, key=rows.of_total))
        if page.counts:
            values = [rows.count_values(count, n) for count, n in page.counts.items()]
            self._add_counts.run(cursor, sorted(values, key=rows.of_count))
        if page.upkeep is not None:
            self._keep_up(cursor, page.upkeep, now_us=page.now_us)

    def _keep_up(self, cursor: Any, upkeep: Upkeep, *, now_us: int) -> None:
        held_until_us = now_us + CLAIM_HELD_US
        self._mark_time.run(cursor, [{"of_boot": upkeep.boot_id, "seen_us": now_us}])
        self._hold_claims.run(cursor, [{"of_owner": upkeep.owner, "held_until_us": held_until_us}])
        self._forget_claims.run(cursor, [{"now_us": now_us}])


def _of(name: ClaimName) -> rows.Values:
    return {"of_key": name.key_id, "of_digest": name.digest}
