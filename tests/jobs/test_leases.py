"""How servers share batch jobs through one store, SQLite or Postgres: leases, and what ends them."""

import os
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest
from sqlalchemy import Connection, text
from tests.accounts.shelf import latest_sqlite
from tests.hand_clock import HandClock

from trivec.accounts import UsageBy, UsageQuery
from trivec.accounts.ledger import LedgerRow
from trivec.accounts.stores.engines import SQLITE_FILE, postgres_engines, sqlite_engines
from trivec.accounts.stores.sql import SqlStore
from trivec.core.errors import (
    FieldInvalid,
    RateLimitExceeded,
    ResourceUnknown,
    StoreUnavailable,
)
from trivec.jobs import records
from trivec.jobs.records import LEASE_S, JobPlan, JobRecord, JobStore, Page, ShardRecord
from trivec.settings import BatchLimits

KEY, MODEL = "key_a", "m"
Opened = tuple[JobStore, SqlStore]


@pytest.fixture(params=["sqlite", "postgres"])
def open_store(
    request: pytest.FixtureRequest, tmp_path: Path, clock: HandClock
) -> Iterator[Callable[..., Opened]]:
    """Opens the same store as another server would."""
    opened: list[SqlStore] = []
    if request.param == "sqlite":
        (tmp_path / SQLITE_FILE).write_bytes(latest_sqlite())
        make = partial(sqlite_engines, tmp_path / SQLITE_FILE)
    else:
        url = request.getfixturevalue("postgres").upgraded_database()
        make = partial(postgres_engines, url)

    def open_one(**limited: int) -> Opened:
        opened.append(SqlStore(make(), upgrades_itself=False))
        limits = BatchLimits(**limited)
        return JobStore(opened[-1], limits, clock=clock), opened[-1]

    yield open_one
    for store in opened:
        store.close()


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


@pytest.fixture
def jobs(open_store: Callable[..., Opened]) -> JobStore:
    return open_store()[0]


def new_job(jobs: JobStore, *, key_id: str = KEY, window_s: float = 3600.0) -> JobRecord:
    file = jobs.add_file(key_id, "batch")
    jobs.keep_file(file)
    return add_job(jobs, file.id, key_id=key_id, window_s=window_s)


def add_job(
    jobs: JobStore, file_id: str, *, key_id: str = KEY, window_s: float = 3600.0
) -> JobRecord:
    return jobs.add_batch(key_id, JobPlan("/v1/embeddings", file_id, window_s))


def lease(jobs: JobStore) -> ShardRecord | None:
    leased = jobs.lease([MODEL])
    return None if leased is None else leased[0]


def leased(jobs: JobStore, kind: str) -> ShardRecord:
    shard = lease(jobs)
    assert shard is not None
    assert shard.kind == kind
    return shard


def validated(jobs: JobStore, *, shards: int = 2, **how: float) -> JobRecord:
    """A batch job whose lines may run: ten in each shard."""
    job = new_job(jobs, **how)  # type: ignore[arg-type]
    made = [ShardRecord(0, "", n + 1, "run", 10 * n + 1, 10, 0, 9, None) for n in range(shards)]
    step = leased(jobs, "validate")
    assert jobs.finish_validation(step, model=MODEL, shards=made, errors=[])
    return job


def rows(shard: ShardRecord) -> list[LedgerRow]:
    """Of ten lines, of which the last failed and is billed nothing."""
    return [
        LedgerRow(5, f"{shard.batch_id}_{n}", KEY, MODEL, 1, 0 if n % 10 == 0 else 3, 200, 1, None)
        for n in range(shard.first_line, shard.first_line + 10)
    ]


def finish(jobs: JobStore, shard: ShardRecord) -> bool:
    return jobs.finish_run(shard, rows(shard), completed=9, failed=1, token_count=27)


def billed(store: SqlStore) -> Sequence[tuple[int, int]]:
    return [(line.requests, line.tokens) for line in store.usage(UsageQuery(UsageBy.KEY))]


def test_from_validation_to_the_end_in_order(open_store: Callable[..., Opened]) -> None:
    jobs, store = open_store()
    job = validated(jobs)
    assert jobs.lines_left() == 20
    first, second = leased(jobs, "run"), leased(jobs, "run")
    assert (first.number, second.number, lease(jobs)) == (1, 2, None)
    assert finish(jobs, second)
    assert jobs.find_batch(KEY, job.id).status == "in_progress"
    assert finish(jobs, first)
    assert jobs.find_batch(KEY, job.id).status == "finalizing"
    join = leased(jobs, "join")
    assert [shard.number for shard in jobs.run_shards(job.id, done=True)] == [1, 2]
    assert jobs.finish_join(join, output=None, error=None)
    ended = jobs.find_batch(KEY, job.id)
    assert (ended.status, ended.completed, ended.failed, ended.token_count) == (
        "completed",
        18,
        2,
        54,
    )
    assert billed(store) == [(20, 54)]
    assert (lease(jobs), jobs.lines_left()) == (None, 0)


def test_no_two_servers_have_the_same_shard(open_store: Callable[..., Opened]) -> None:
    validated(open_store()[0], shards=20)
    found: list[int] = []
    barrier = threading.Barrier(4)

    def work() -> None:
        jobs, _ = open_store()
        barrier.wait()
        while len(found) < 20:
            with suppress(StoreUnavailable):  # on a slow machine: a lock, a connection
                if (shard := lease(jobs)) is not None:
                    found.append(shard.number)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == list(range(1, 21))


def test_a_lease_ends_with_time_and_whoever_had_it_is_too_late(
    open_store: Callable[..., Opened], clock: HandClock
) -> None:
    (one, store), (other, _) = open_store(), open_store()
    job = validated(one, shards=1)
    dead = leased(one, "run")
    clock.move(LEASE_S - 1)
    assert lease(other) is None
    clock.move(1)
    taken = leased(other, "run")
    assert taken.lease != dead.lease
    assert not one.renew(dead)
    assert not finish(one, dead)
    assert billed(store) == []
    assert finish(other, taken)
    assert billed(store) == [(10, 27)]
    assert one.find_batch(KEY, job.id).completed == 9


def test_a_lease_that_is_renewed_holds(jobs: JobStore, clock: HandClock) -> None:
    validated(jobs, shards=1)
    shard = leased(jobs, "run")
    for _ in range(3):
        clock.move(LEASE_S - 1)
        assert jobs.renew(shard)
        assert lease(jobs) is None
    jobs.release(shard)
    assert leased(jobs, "run").number == shard.number


def test_a_commit_that_was_not_heard_of_counts_once(
    open_store: Callable[..., Opened], monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs, store = open_store()
    validated(jobs, shards=2)
    shard = leased(jobs, "run")
    assert finish(jobs, shard)
    assert finish(jobs, shard)  # as after a connection that broke
    assert billed(store) == [(10, 27)]

    other = leased(jobs, "run")
    record = store.record

    def broken(*given: object) -> None:
        record(*given)  # type: ignore[arg-type]
        raise StoreUnavailable("gone", retry_after_s=1)

    monkeypatch.setattr(store, "record", broken)
    with pytest.raises(StoreUnavailable):
        finish(jobs, other)
    monkeypatch.undo()
    assert billed(store) == [(10, 27)]  # neither the mark nor a row
    assert finish(jobs, other)
    assert billed(store) == [(20, 54)]


def test_a_line_is_in_the_ledger_once_whatever_the_shards_say(
    open_store: Callable[..., Opened],
) -> None:
    jobs, store = open_store()
    validated(jobs, shards=1)
    shard = leased(jobs, "run")
    assert finish(jobs, shard)
    with store.writing() as connection:
        connection.execute(text("UPDATE batch_shards SET done_us = NULL WHERE kind = 'run'"))
    with pytest.raises(Exception, match=r"(?i)unique"):
        finish(jobs, shard)
    assert billed(store) == [(10, 27)]


def test_a_job_that_is_cancelled_waits_for_its_shards_and_no_later_one_counts(
    jobs: JobStore, clock: HandClock
) -> None:
    job = validated(jobs, shards=3)
    done, late, slow = (leased(jobs, "run") for _ in range(3))
    assert finish(jobs, done)
    assert jobs.cancel_batch(KEY, job.id).status == "cancelling"
    assert not jobs.renew(late)
    assert lease(jobs) is None  # two are still at work
    assert finish(jobs, slow)
    clock.move(LEASE_S)
    join = leased(jobs, "join")
    assert not finish(jobs, late)
    assert [shard.number for shard in jobs.run_shards(job.id, done=True)] == [1, 3]
    assert jobs.finish_join(join, output=None, error=None)
    ended = jobs.find_batch(KEY, job.id)
    assert (ended.status, ended.completed) == ("cancelled", 18)


def test_a_job_expires_by_the_clock(jobs: JobStore, clock: HandClock) -> None:
    job = validated(jobs, shards=2, window_s=100.0)
    assert finish(jobs, leased(jobs, "run"))
    clock.move(100)
    jobs.expire_batches()
    join = leased(jobs, "join")
    assert jobs.finish_join(join, output=None, error=None)
    ended = jobs.find_batch(KEY, job.id)
    assert (ended.status, ended.completed, ended.failed) == ("expired", 9, 11)


def test_jobs_take_turns(jobs: JobStore, clock: HandClock) -> None:
    large = validated(jobs, shards=5)
    leased(jobs, "run")
    clock.move(1)
    small = validated(jobs, shards=2)
    turns = []
    for _ in range(4):
        clock.move(1)
        turns.append(leased(jobs, "run").batch_id)
    assert turns == [large.id, small.id, large.id, small.id]  # by when each had one last


def test_a_key_that_has_had_its_day_waits_and_no_other(
    open_store: Callable[..., Opened], clock: HandClock
) -> None:
    (jobs, _), (more, _) = open_store(tokens_per_day=27), open_store(tokens_per_day=28)
    mine = validated(jobs, shards=3)
    assert finish(jobs, leased(jobs, "run"))
    assert lease(jobs) is None
    other = new_job(jobs, key_id="key_b")
    step = leased(jobs, "validate")
    assert step.batch_id == other.id
    assert jobs.finish_validation(step, model=None, shards=[], errors=[{"code": "empty_file"}])
    assert jobs.find_batch("key_b", other.id).status == "failed"
    assert leased(more, "run").batch_id == mine.id
    assert lease(jobs) is None
    clock.move(24 * 3600)
    assert leased(jobs, "run").batch_id == mine.id


def test_lines_of_a_model_that_is_not_served_here_are_left_to_others(jobs: JobStore) -> None:
    validated(jobs, shards=1)
    assert jobs.lease(["another"]) is None
    assert leased(jobs, "run").number == 1


def test_what_a_dead_process_of_this_machine_had_is_free_at_the_next_start(
    jobs: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    validated(jobs, shards=4)
    monkeypatch.setattr(records, "_process", lambda: f"{socket.gethostname()}/999999999")
    of_dead = leased(jobs, "run").number
    monkeypatch.setattr(records, "_process", lambda: f"{socket.gethostname()}/{os.getppid()}")
    leased(jobs, "run")  # of another process, which is alive
    monkeypatch.setattr(records, "_process", lambda: "elsewhere/999999999")
    leased(jobs, "run")
    monkeypatch.undo()
    of_this = leased(jobs, "run").number
    assert lease(jobs) is None
    jobs.release_dead()
    assert {leased(jobs, "run").number for _ in range(2)} == {of_dead, of_this}
    assert lease(jobs) is None


def test_a_key_has_so_many_open_jobs_at_a_time(
    jobs: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "OPEN_BATCHES_MAX", 2)
    job = new_job(jobs)
    new_job(jobs)
    with pytest.raises(RateLimitExceeded, match="batches that have not ended: limit 2"):
        new_job(jobs)
    new_job(jobs, key_id="key_b")
    jobs.cancel_batch(KEY, job.id)
    assert jobs.finish_join(leased(jobs, "join"), output=None, error=None)
    new_job(jobs)
    assert len(jobs.list_batches(KEY, Page(None, 10))) == 3


def test_shards_are_old_a_day_after_the_end(jobs: JobStore, clock: HandClock) -> None:
    job = validated(jobs, shards=1)
    assert finish(jobs, leased(jobs, "run"))
    assert jobs.finish_join(leased(jobs, "join"), output=None, error=None)
    assert jobs.old_batches() == []
    clock.move(24 * 3600)
    assert jobs.old_batches() == [(KEY, job.id)]
    jobs.forget_shards(job.id)
    assert (jobs.run_shards(job.id, done=True), jobs.old_batches()) == ([], [])


def test_a_file_that_a_job_reads_neither_expires_nor_is_deleted(
    jobs: JobStore, clock: HandClock
) -> None:
    job = new_job(jobs, window_s=1e6)
    with pytest.raises(FieldInvalid, match="reading"):
        jobs.delete_file(KEY, job.input_file_id)
    assert jobs.dead_files() == []
    jobs.cancel_batch(KEY, job.id)
    assert jobs.finish_join(leased(jobs, "join"), output=None, error=None)
    assert jobs.delete_file(KEY, job.input_file_id).id == job.input_file_id
    assert [file.id for file in jobs.dead_files()] == [job.input_file_id]


def beside(
    monkeypatch: pytest.MonkeyPatch, store: SqlStore, work: Callable[[], object]
) -> tuple[threading.Thread, list[object]]:
    """Has another server do *work* while a transaction of *store* is open; what came of it."""
    outcomes: list[object] = []

    def run() -> None:
        try:
            outcomes.append(work())
        except (FieldInvalid, RateLimitExceeded, StoreUnavailable) as refused:
            outcomes.append(refused)

    working, writing = threading.Thread(target=run), store.writing

    @contextmanager
    def slow() -> Iterator[Connection]:
        with writing() as connection:
            yield connection
            working.start()
            working.join(timeout=0.5)  # it waits for us, or it is wrong

    monkeypatch.setattr(store, "writing", slow)
    return working, outcomes


def test_a_file_is_not_deleted_while_a_job_is_made_of_it(
    open_store: Callable[..., Opened], monkeypatch: pytest.MonkeyPatch
) -> None:
    (jobs, store), (other, _) = open_store(), open_store()
    jobs.keep_file(file := jobs.add_file(KEY, "batch"))
    other.find_file(KEY, file.id)
    deleting, outcomes = beside(monkeypatch, store, lambda: other.delete_file(KEY, file.id))
    job = add_job(jobs, file.id)
    deleting.join()
    assert [type(outcome) for outcome in outcomes] == [FieldInvalid]
    assert jobs.find_file(KEY, job.input_file_id) == file


def test_two_servers_together_keep_no_more_files_than_a_key_may_have(
    open_store: Callable[..., Opened], monkeypatch: pytest.MonkeyPatch
) -> None:
    (jobs, store), (other, _) = open_store(key_files_max=1), open_store(key_files_max=1)
    first, second = (jobs.add_file(KEY, "batch") for _ in range(2))
    keeping, outcomes = beside(monkeypatch, store, lambda: other.keep_file(second))
    jobs.keep_file(first)
    keeping.join()
    assert [type(outcome) for outcome in outcomes] == [FieldInvalid]
    assert other.list_files(KEY, Page(None, 9), purpose=None) == [first]


def test_two_servers_together_begin_no_more_jobs_than_a_key_may_have(
    open_store: Callable[..., Opened], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "OPEN_BATCHES_MAX", 1)
    (jobs, store), (other, _) = open_store(), open_store()
    first, second = (jobs.add_file(KEY, "batch") for _ in range(2))
    for file in (first, second):
        jobs.keep_file(file)
    other.find_file(KEY, second.id)
    adding, outcomes = beside(monkeypatch, store, lambda: add_job(other, second.id))
    job = add_job(jobs, first.id)
    adding.join()
    assert [type(outcome) for outcome in outcomes] == [RateLimitExceeded]
    assert jobs.list_batches(KEY, Page(None, 9)) == [job]


def test_a_list_goes_on_after_what_was_deleted(jobs: JobStore, clock: HandClock) -> None:
    made = []
    for key_id in (KEY, KEY, "key_b", KEY):
        clock.move(1)
        made.append(file := jobs.add_file(key_id, "batch"))
        jobs.keep_file(file)
    first, second, _, last = made
    [found, *_] = jobs.list_files(KEY, Page(None, 1), purpose=None)
    jobs.forget_file(jobs.delete_file(KEY, found.id).id)
    assert found == last
    assert jobs.list_files(KEY, Page(found.id, 9), purpose=None) == [second, first]
    oldest_first = Page(first.id, 9, newest_first=False)
    assert jobs.list_files(KEY, oldest_first, purpose="batch") == [second]


@pytest.mark.parametrize("text", ["\0", "file-\0", "é\u2028", "'; --", ""])
def test_any_text_may_be_sent_for_an_id(jobs: JobStore, text: str) -> None:
    new_job(jobs)
    with pytest.raises(ResourceUnknown):
        add_job(jobs, text)
    for ask in (jobs.find_file, jobs.delete_file, jobs.find_batch, jobs.cancel_batch):
        with pytest.raises(ResourceUnknown):
            ask(KEY, text)
    assert jobs.list_files(KEY, Page(None, 9), purpose=text) == []
    assert len(jobs.list_files(KEY, Page(text, 9, newest_first=False), purpose=None)) <= 1
    assert len(jobs.list_batches(KEY, Page(text, 9))) <= 1


def test_a_store_that_is_away_is_said(tmp_path: Path, clock: HandClock) -> None:
    engines = sqlite_engines(tmp_path / "absent" / SQLITE_FILE)
    with closing(SqlStore(engines, upgrades_itself=True)) as store, pytest.raises(StoreUnavailable):
        JobStore(store, BatchLimits(), clock=clock).lines_left()
