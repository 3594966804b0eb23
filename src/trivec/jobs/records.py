"""Records of files and batch jobs in the store, and the leases by which servers share the work.

A batch job is validated, then its lines run in shards, then their part files are joined. Each of
these steps is a row of `batch_shards`. A server leases one, renews the lease while it works, and
finishes it in one transaction; the lease of a server that died ends after `LEASE_S`. Every lease has
a token of its own, so a server that lost one cannot finish the step. All methods block.
"""

import json
import os
import secrets
import socket
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, TypeAlias, TypeVar

import sqlalchemy as sa

from trivec.accounts.ledger import LedgerRow
from trivec.accounts.stores.sql import SqlStore
from trivec.accounts.stores.tables import batch_shards, batches, files
from trivec.accounts.utc import DAY_US
from trivec.core.errors import FieldInvalid, RateLimitExceeded, ResourceUnknown
from trivec.core.ports import Clock
from trivec.settings import BatchLimits

LEASE_S = 30.0
OPEN_BATCHES_MAX = 100  # of one key
ID_CHARS_SHOWN = 64  # of an unknown id, which may be any text
OPEN = ("validating", "in_progress", "finalizing", "cancelling")  # in which it has not ended
STEP_STATUS = {"validate": OPEN[:1], "run": OPEN[1:2], "join": OPEN[2:]}
Kind: TypeAlias = Literal["validate", "run", "join"]
Status: TypeAlias = Literal[
    "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling",
    "cancelled",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A file of a key. Its name is the client's, and never used as a path."""

    id: str
    key_id: str
    purpose: str  # batch or batch_output
    filename: str
    byte_count: int
    created_us: int  # microseconds since the epoch, here and below
    expires_us: int | None


@dataclass(frozen=True, slots=True)
class JobPlan:
    """A batch job as a client asks for it."""

    endpoint: str
    input_file_id: str
    window_s: float  # to answer its lines in
    metadata: Mapping[str, str] | None = None
    output_expires_s: int | None = None


@dataclass(frozen=True, slots=True)
class JobRecord:
    """A batch job, as it stands."""

    id: str
    key_id: str
    endpoint: str
    model: str | None
    input_file_id: str
    output_file_id: str | None
    error_file_id: str | None
    status: Status
    ends_as: Status
    metadata: str | None  # a JSON object
    errors: str | None  # a JSON array
    output_expires_s: int | None
    created_us: int
    expires_us: int
    in_progress_us: int | None
    finalizing_us: int | None
    completed_us: int | None
    failed_us: int | None
    expired_us: int | None
    cancelling_us: int | None
    cancelled_us: int | None
    total: int
    completed: int
    failed: int
    token_count: int


@dataclass(frozen=True, slots=True)
class ShardRecord:
    """One step of a batch job, and of a run the lines that it reads."""

    id: int
    batch_id: str
    number: int
    kind: Kind
    first_line: int
    line_count: int
    byte_start: int
    byte_count: int
    lease: str | None
    completed: int = 0
    failed: int = 0
    token_count: int = 0


@dataclass(frozen=True, slots=True)
class Page:
    """A part of a list: after the record with the id *after*, at most *limit*."""

    after: str | None
    limit: int
    newest_first: bool = True


R = TypeVar("R", FileRecord, JobRecord, ShardRecord)


class JobStore:
    """Files, batch jobs and shards. A key finds only its own."""

    def __init__(self, store: SqlStore, limits: BatchLimits, *, clock: Clock) -> None:
        self._store = store
        self._limits = limits
        self._clock = clock
        self.close = store.close

    def now_us(self) -> int:
        return int(self._clock.wall_s() * 1e6)

    # Files. A row is made before the bytes and deleted after them, so that a sweep finds all bytes.

    def add_file(self, key_id: str, purpose: str) -> FileRecord:
        """A pending file. Raises `FieldInvalid` where the key has no room for one more."""
        now_us = self.now_us()
        new = FileRecord(_new_id("file-", now_us), key_id, purpose, "", 0, now_us, None)
        with self._changing(key_id) as connection:
            if purpose == "batch":  # what a job has computed is kept all the same
                self._check_room(connection, key_id, more=1)
            connection.execute(sa.insert(files), {**asdict(new), "state": "pending"})
        return new

    def keep_file(self, file: FileRecord) -> None:
        """Mark it as stored. Raises `FieldInvalid` where its key has no room for it."""
        with self._changing(file.key_id) as connection:
            _store_file(connection, file)
            self._check_room(connection, file.key_id)

    def find_file(self, key_id: str, file_id: str) -> FileRecord:
        """Raises `ResourceUnknown`."""
        with self._store.reading() as connection:
            return self._find_file(connection, key_id, file_id)

    def list_files(self, key_id: str, page: Page, *, purpose: str | None) -> list[FileRecord]:
        is_meant = self._is_there(key_id)
        if purpose is not None:
            is_meant &= files.c.purpose == _plain(purpose)
        return self._read(FileRecord, _paged(files, is_meant, page))

    def delete_file(self, key_id: str, file_id: str) -> FileRecord:
        """Mark it as deleted. Raises `ResourceUnknown`, `FieldInvalid` where a batch job reads it."""
        with self._changing(key_id) as connection:
            found = self._find_file(connection, key_id, file_id)
            is_own = files.c.id == found.id
            deleted = connection.execute(
                sa.update(files).where(is_own, ~_is_read()).values(state="deleted")
            )
            if not deleted.rowcount:
                raise FieldInvalid(
                    f"A batch is reading {file_id}. Cancel that batch first, or wait for its end.",
                    param="file_id",
                )
        return found

    def dead_files(self) -> list[FileRecord]:
        """Files to be removed: deleted, expired, or begun a day ago and never stored."""
        now_us = self.now_us()
        is_dead = sa.or_(
            files.c.state == "deleted",
            (files.c.state == "pending") & (files.c.created_us < now_us - DAY_US),
            (files.c.expires_us <= now_us) & ~_is_read(),
        )
        return self._read(FileRecord, sa.select(files).where(is_dead).limit(1_000))

    def forget_file(self, file_id: str) -> None:
        """Delete the record of a file whose bytes were removed."""
        self._change(sa.delete(files).where(files.c.id == file_id))

    def _check_room(self, connection: sa.Connection, key_id: str, *, more: int = 0) -> None:
        """Raise `FieldInvalid` where a key has more than it may, or no room for *more* files."""
        sums = sa.select(sa.func.count(), sa.func.sum(files.c.byte_count))
        is_own = (files.c.key_id == key_id) & (files.c.state == "stored")
        count, used = connection.execute(sums.where(is_own)).one()
        used, limits = int(used or 0), self._limits
        if count + more > limits.key_files_max or used + more > limits.key_bytes_max:
            raise FieldInvalid(
                f"This key would have {count + more:,} files of {used:,} bytes; at most "
                f"{limits.key_files_max:,} of {limits.key_bytes_max:,} are kept. Delete some first.",
                param="file",
            )

    @contextmanager
    def _changing(self, key_id: str) -> Iterator[sa.Connection]:
        """A transaction that writes, the only one at a time of this kind for *key_id*.

        So what a key may have is counted exactly, and no file is deleted that a new job will read.
        On SQLite only one transaction writes at a time anyway.
        """
        with self._store.writing() as connection:
            if connection.dialect.name == "postgresql":
                number = sa.func.hashtextextended(key_id, 0)
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(number)))
            yield connection

    def _find_file(self, connection: sa.Connection, key_id: str, file_id: str) -> FileRecord:
        found = sa.select(files).where(files.c.id == _plain(file_id), self._is_there(key_id))
        row = connection.execute(found).first()
        if row is None:
            raise ResourceUnknown(f"No such File object: {file_id[:ID_CHARS_SHOWN]}")
        return _record(FileRecord, row)

    def _is_there(self, key_id: str) -> sa.ColumnElement[bool]:
        is_live = files.c.expires_us.is_(None) | (files.c.expires_us > self.now_us())
        return sa.and_(files.c.key_id == key_id, files.c.state == "stored", is_live | _is_read())

    # Batch jobs.

    def add_batch(self, key_id: str, plan: JobPlan) -> JobRecord:
        """A batch job to validate. Raises `ResourceUnknown`, `FieldInvalid`, `RateLimitExceeded`."""
        now_us = self.now_us()
        batch_id = _new_id("batch_", now_us)
        new = sa.insert(batches).values(
            id=batch_id,
            key_id=key_id,
            endpoint=plan.endpoint,
            input_file_id=plan.input_file_id,
            status="validating",
            ends_as="completed",
            metadata=None if plan.metadata is None else json.dumps(plan.metadata),
            output_expires_s=plan.output_expires_s,
            created_us=now_us,
            expires_us=now_us + round(plan.window_s * 1e6),
        )
        with self._changing(key_id) as connection:
            file = self._find_file(connection, key_id, plan.input_file_id)
            if file.purpose != "batch":
                raise FieldInvalid(
                    f"The file {file.id} has the purpose {file.purpose}. Upload it with the purpose "
                    "batch.",
                    param="input_file_id",
                )
            is_open = (batches.c.key_id == key_id) & batches.c.status.in_(OPEN)
            counted = sa.select(sa.func.count()).select_from(batches).where(is_open)
            count = connection.scalars(counted).one()
            if count >= OPEN_BATCHES_MAX:
                raise RateLimitExceeded(
                    kind="requests",
                    limit=OPEN_BATCHES_MAX,
                    requested=count + 1,
                    retry_after_s=60.0,
                    subject="batches that have not ended",
                )
            made = connection.execute(new.returning(*batches.c)).one()
            for number, kind in ((0, "validate"), (-1, "join")):
                step = {"batch_id": batch_id, "number": number, "kind": kind}
                connection.execute(sa.insert(batch_shards), step)
        return _record(JobRecord, made)

    def find_batch(self, key_id: str, batch_id: str) -> JobRecord:
        """Raises `ResourceUnknown`."""
        found = self._read(JobRecord, sa.select(batches).where(_is_job(key_id, batch_id)))
        if not found:
            raise ResourceUnknown(f"No batch found with id '{batch_id[:ID_CHARS_SHOWN]}'.")
        return found[0]

    def list_batches(self, key_id: str, page: Page) -> list[JobRecord]:
        return self._read(JobRecord, _paged(batches, batches.c.key_id == key_id, page))

    def cancel_batch(self, key_id: str, batch_id: str) -> JobRecord:
        """Raises `ResourceUnknown`; `FieldInvalid` for one that has ended, or is about to."""
        is_cancelled = self._change(
            sa.update(batches)
            .where(_is_job(key_id, batch_id), batches.c.status.in_(OPEN[:2]))
            .values(status="cancelling", ends_as="cancelled", cancelling_us=self.now_us())
        )
        found = self.find_batch(key_id, batch_id)
        if not is_cancelled and found.status not in ("cancelling", "cancelled"):
            raise FieldInvalid(f"Cannot cancel a batch with status '{found.status}'.")
        return found

    def lines_left(self) -> int:
        """Lines of all running jobs that are not answered yet."""
        left = sa.func.sum(batches.c.total - batches.c.completed - batches.c.failed)
        with self._store.reading() as connection:
            found = connection.scalar(sa.select(left).where(batches.c.status == "in_progress"))
        return int(found or 0)

    # Leases. Rows of shards are locked before those of jobs, so that no transactions deadlock.

    def expire_batches(self) -> None:
        """End the jobs whose window is over; their files will have what was answered."""
        now_us = self.now_us()
        self._change(
            sa.update(batches)
            .where(batches.c.status.in_(OPEN[:2]), batches.c.expires_us <= now_us)
            .values(status="finalizing", ends_as="expired", finalizing_us=now_us)
        )

    def lease(self, models: Collection[str]) -> tuple[ShardRecord, JobRecord] | None:
        """The next step of the batch job that has waited longest, leased; None: there is none.

        Lines run of the *models* that are served here, and of keys whose batch jobs have computed
        fewer tokens in the last 24 hours than they may.
        """
        now_us = self.now_us()
        other = batch_shards.alias()
        is_worked_on = sa.exists().where(
            other.c.batch_id == batches.c.id,
            other.c.kind != "join",
            other.c.done_us.is_(None),
            other.c.lease_until_us > now_us,
        )
        is_running = (batch_shards.c.kind == "run") & (batches.c.status == "in_progress")
        is_running &= batches.c.model.in_(models)
        if (tokens_per_day := self._limits.tokens_per_day) is not None:
            spent = (
                sa.select(batches.c.key_id)
                .join(batch_shards)
                .where(batch_shards.c.done_us > now_us - DAY_US)
                .group_by(batches.c.key_id)
                .having(sa.func.sum(batch_shards.c.token_count) >= tokens_per_day)
            )
            is_running &= batches.c.key_id.not_in(spent)
        is_due = sa.or_(
            is_running,
            (batch_shards.c.kind == "validate") & (batches.c.status == "validating"),
            sa.and_(
                batch_shards.c.kind == "join",
                batches.c.status.in_(STEP_STATUS["join"]),
                ~is_worked_on,
            ),
        )
        is_free = batch_shards.c.done_us.is_(None) & (batch_shards.c.lease_until_us <= now_us)
        next_id = (
            sa.select(batch_shards.c.id)
            .join(batches)
            .where(is_free, is_due)
            .order_by(batches.c.served_us, batches.c.created_us, batch_shards.c.number)
            .limit(1)
            .with_for_update(skip_locked=True, of=batch_shards)
        )
        leasing = (
            sa.update(batch_shards)
            .where(batch_shards.c.id == next_id.scalar_subquery())
            .values(
                lease=f"{_process()}/{secrets.token_hex(16)}",
                lease_until_us=now_us + round(LEASE_S * 1e6),
            )
            .returning(*batch_shards.c)
        )
        with self._store.writing() as connection:
            found = connection.execute(leasing).first()
            if found is None:
                return None
            shard = _record(ShardRecord, found)
            is_own = batch_shards.c.batch_id == shard.batch_id
            if shard.kind == "join":  # servers still at work on its shards must not finish them now
                connection.execute(
                    sa.update(batch_shards)
                    .where(is_own, batch_shards.c.kind != "join", batch_shards.c.done_us.is_(None))
                    .values(lease=None)
                )
            served = sa.update(batches).where(batches.c.id == shard.batch_id)
            job = connection.execute(served.values(served_us=now_us).returning(*batches.c)).one()
        return shard, _record(JobRecord, job)

    def renew(self, shard: ShardRecord) -> bool:
        """Prolong the lease; False where it was lost, or the job has ended meanwhile."""
        until_us = self.now_us() + round(LEASE_S * 1e6)
        is_due = batches.c.status.in_(STEP_STATUS[shard.kind])
        is_wanted = sa.exists().where(batches.c.id == shard.batch_id, is_due)
        is_own = sa.and_(_is_held(shard), is_wanted)
        return self._change(sa.update(batch_shards).where(is_own).values(lease_until_us=until_us))

    def release(self, shard: ShardRecord) -> None:
        """End the lease now, so that another server can take the step."""
        self._change(sa.update(batch_shards).where(_is_held(shard)).values(lease_until_us=0))

    def release_dead(self) -> None:
        """Release the leases of dead processes of this machine, and of an earlier one of our PID."""
        ours = batch_shards.c.lease.startswith(f"{socket.gethostname()}/", autoescape=True)
        is_leased = batch_shards.c.done_us.is_(None) & (batch_shards.c.lease_until_us > 0)
        leased = sa.select(batch_shards.c.id, batch_shards.c.lease).where(is_leased, ours)
        with self._store.writing() as connection:
            found = connection.execute(leased)
            dead = [row.id for row in found if not _is_other_alive(int(row.lease.split("/")[1]))]
            is_dead = batch_shards.c.id.in_(dead)
            connection.execute(sa.update(batch_shards).where(is_dead).values(lease_until_us=0))

    def finish_validation(
        self,
        shard: ShardRecord,
        *,
        model: str | None,
        shards: Sequence[ShardRecord],
        errors: Sequence[Mapping[str, object]],
    ) -> bool:
        """Let the lines run, in *shards*; or fail the batch job, where there are *errors*.

        Here and below, False where the lease was lost; then nothing is changed.
        """
        now_us = self.now_us()
        values: dict[str, object] = {"status": "in_progress", "in_progress_us": now_us}
        values |= {"model": model, "total": sum(one.line_count for one in shards)}
        if errors:
            values = {"status": "failed", "failed_us": now_us, "errors": json.dumps(errors)}
        with self._store.writing() as connection:
            if not _mark_done(connection, shard, done_us=now_us):
                return self._was_done(connection, shard)
            begun = connection.execute(
                sa.update(batches)
                .where(batches.c.id == shard.batch_id, batches.c.status == "validating")
                .values(values)
            )
            if begun.rowcount and not errors:
                places = ("number", "kind", "first_line", "line_count", "byte_start", "byte_count")
                added = [
                    {"batch_id": shard.batch_id, **{name: getattr(one, name) for name in places}}
                    for one in shards
                ]
                connection.execute(sa.insert(batch_shards), added)
        return True

    def finish_run(self, shard: ShardRecord, rows: Sequence[LedgerRow], **counts: int) -> bool:
        """Mark the shard done and bill its lines by *rows*, in one transaction.

        *counts*: completed, failed and token_count of its lines.
        """
        now_us = self.now_us()
        job = sa.update(batches).where(batches.c.id == shard.batch_id)
        with self._store.writing() as connection:
            if not _mark_done(connection, shard, done_us=now_us, **counts):
                return self._was_done(connection, shard)
            # Locks the row: of two that finish the last shards, the later sees the other's.
            added = {name: batches.c[name] + more for name, more in counts.items()}
            connection.execute(job.values(added))
            left = sa.exists().where(
                batch_shards.c.batch_id == shard.batch_id,
                batch_shards.c.kind == "run",
                batch_shards.c.done_us.is_(None),
            )
            over = job.where(batches.c.status == "in_progress", ~left)
            connection.execute(over.values(status="finalizing", finalizing_us=now_us))
            self._store.record(connection, rows)
        return True

    def finish_join(
        self,
        shard: ShardRecord,
        *,
        output: FileRecord | None,
        error: FileRecord | None,
        errors: Sequence[Mapping[str, object]] = (),
    ) -> bool:
        """End the job, with its files; *errors* say what they lack."""
        now_us = self.now_us()
        with self._store.writing() as connection:
            if not _mark_done(connection, shard, done_us=now_us):
                return self._was_done(connection, shard)
            for file in (output, error):
                if file is not None:
                    _store_file(connection, file)
            is_own = batches.c.id == shard.batch_id
            ends_as = connection.scalar(sa.select(batches.c.ends_as).where(is_own))
            values = {
                "status": ends_as,
                f"{ends_as}_us": now_us,
                "output_file_id": output and output.id,
                "error_file_id": error and error.id,
                "errors": json.dumps(errors) if errors else None,
            }
            if ends_as == "expired":  # the lines that never ran
                values["failed"] = batches.c.total - batches.c.completed
            connection.execute(sa.update(batches).where(is_own).values(values))
        return True

    def run_shards(self, batch_id: str, *, done: bool) -> list[ShardRecord]:
        """The shards whose lines were answered, or the others; in order."""
        is_done = batch_shards.c.done_us.is_not(None) == done
        statement = sa.select(batch_shards).where(
            batch_shards.c.batch_id == batch_id, batch_shards.c.kind == "run", is_done
        )
        return self._read(ShardRecord, statement.order_by(batch_shards.c.number))

    def old_batches(self) -> list[tuple[str, str]]:
        """Key and id of jobs that ended over a day ago: `tokens_per_day` needs no shard of theirs."""
        is_young = sa.exists().where(
            batch_shards.c.batch_id == batches.c.id, batch_shards.c.done_us > self.now_us() - DAY_US
        )
        has_shards = sa.exists().where(batch_shards.c.batch_id == batches.c.id)
        is_old = sa.and_(batches.c.status.not_in(OPEN), has_shards, ~is_young)
        with self._store.reading() as connection:
            found = connection.execute(sa.select(batches.c.key_id, batches.c.id).where(is_old))
            return [(row.key_id, row.id) for row in found]

    def forget_shards(self, batch_id: str) -> None:
        self._change(sa.delete(batch_shards).where(batch_shards.c.batch_id == batch_id))

    def _read(self, kind: type[R], statement: sa.Select[Any]) -> list[R]:
        with self._store.reading() as connection:
            return [_record(kind, row) for row in connection.execute(statement)]

    def _change(self, statement: sa.Update | sa.Delete) -> bool:
        """Whether it changed a row."""
        with self._store.writing() as connection:
            return connection.execute(statement).rowcount > 0

    def _was_done(self, connection: sa.Connection, shard: ShardRecord) -> bool:
        """Whether an earlier try finished the step, though its commit was not confirmed."""
        is_own = (batch_shards.c.id == shard.id) & (batch_shards.c.lease == shard.lease)
        return connection.scalar(sa.select(batch_shards.c.done_us).where(is_own)) is not None


def _process() -> str:
    return f"{socket.gethostname()}/{os.getpid()}"


def _is_other_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError as refused:
        return isinstance(refused, PermissionError)
    return pid != os.getpid()


def _record(kind: type[R], row: sa.Row[Any]) -> R:
    """The row as a *kind*, which may have fewer fields."""
    return kind(**{field.name: row._mapping[field.name] for field in fields(kind)})


def _is_job(key_id: str, batch_id: str) -> sa.ColumnElement[bool]:
    return (batches.c.id == _plain(batch_id)) & (batches.c.key_id == key_id)


def _is_held(shard: ShardRecord) -> sa.ColumnElement[bool]:
    return sa.and_(
        batch_shards.c.id == shard.id,
        batch_shards.c.lease == shard.lease,
        batch_shards.c.done_us.is_(None),
    )


def _mark_done(connection: sa.Connection, shard: ShardRecord, **values: object) -> bool:
    marking = sa.update(batch_shards).where(_is_held(shard)).values(**values)
    return connection.execute(marking).rowcount > 0


def _store_file(connection: sa.Connection, file: FileRecord) -> None:
    connection.execute(
        sa.update(files).where(files.c.id == file.id).values({**asdict(file), "state": "stored"})
    )


def _is_read() -> sa.ColumnElement[bool]:
    """Whether a batch job that has not ended reads the file."""
    return sa.exists().where(batches.c.input_file_id == files.c.id, batches.c.status.in_(OPEN))


def _paged(table: sa.Table, is_meant: sa.ColumnElement[bool], page: Page) -> sa.Select[Any]:
    """The page, and one record more where there is one."""
    own_id = table.c.id
    if page.after is not None:  # a record that may be gone by now
        after = _plain(page.after)
        is_meant &= own_id < after if page.newest_first else own_id > after
    order = own_id.desc() if page.newest_first else own_id
    return sa.select(table).where(is_meant).order_by(order).limit(page.limit + 1)


def _new_id(prefix: str, now_us: int) -> str:
    """Ids sort by the time they were made, so that a list can go on after any of them."""
    return f"{prefix}{now_us:014x}{secrets.token_hex(9)}"


def _plain(text: str) -> str:
    """A client's text without NUL, which Postgres refuses."""
    return text.replace("\0", " ")
