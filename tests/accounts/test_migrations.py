"""From nothing, and from every earlier schema, to the one this version reads."""

import sqlite3
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError
from tests.accounts.shelf import a_row, ask

from trivec.accounts import RateLimits, UsageBy, UsageLine, UsageQuery
from trivec.accounts.archive import ArchiveRun
from trivec.accounts.ledger import RecordUsage
from trivec.accounts.rate_limits import Grant
from trivec.accounts.stores import tables
from trivec.accounts.stores.engines import SQLITE_FILE, Engines, postgres_engines, sqlite_engines
from trivec.accounts.stores.sql import SqlStore
from trivec.accounts.utc import DAY_US, MINUTE_US
from trivec.core.errors import FieldInvalid, RateLimitExceeded, StoreRefused

OLD_ROWS = (
    "INSERT INTO keys (id, name, scopes, created_us, revision) VALUES ('key_a', 'a', 'embed', 1, 1)",
    "UPDATE keyring SET revision = 1",
    "INSERT INTO ledger (time_us, request_id, key_id, model, input_count, token_count, status, "
    "duration_us) VALUES (5, 'r1', 'key_a', 'm', 1, 7, 200, 9)",
)


@pytest.fixture(params=["sqlite", "postgres"])
def engines(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Engines]:
    if request.param == "sqlite":
        made = sqlite_engines(tmp_path / SQLITE_FILE)
    else:
        made = postgres_engines(request.getfixturevalue("postgres").new_database())
    yield made
    made.dispose()


def test_from_nothing(engines: Engines) -> None:
    with engines.writing.begin() as connection:
        tables.upgrade(connection)
        assert differences(connection) == []


def test_stores_of_one_process_are_made_at_once(tmp_path: Path) -> None:
    """As those of accounts and of batch jobs are: Alembic knows one connection a process."""
    all_made = [sqlite_engines(tmp_path / f"{i}.sqlite3") for i in range(4)]
    gate = threading.Barrier(len(all_made))

    def make(engines: Engines) -> list[object]:
        with engines.writing.begin() as connection:
            gate.wait()
            tables.upgrade(connection)
            return differences(connection)

    with ThreadPoolExecutor(len(all_made)) as pool:
        assert list(pool.map(make, all_made)) == [[]] * len(all_made)
    for engines in all_made:
        engines.dispose()


def test_from_the_first_schema_with_its_rows(engines: Engines) -> None:
    with engines.writing.begin() as connection:
        tables.upgrade(connection, "0001")
        for statement in OLD_ROWS:
            connection.execute(text(statement))

    store = SqlStore(engines, upgrades_itself=True)
    (line,) = store.usage(UsageQuery(UsageBy.KEY))

    assert (line.group, line.requests, line.tokens) == ("key_a", 1, 7)
    assert [key.name for key in store.keys_since(0).keys] == ["a"]
    with engines.writing.begin() as connection:
        assert differences(connection) == []


def test_totals_of_an_old_ledger_are_filled_in_and_its_rows_stay(engines: Engines) -> None:
    with engines.writing.begin() as connection:
        tables.upgrade(connection, "0002")
        for n, (model, status, tokens) in enumerate([("'m'", 200, 7), ("NULL", 404, 0)] * 3):
            connection.execute(
                text(
                    "INSERT INTO ledger (time_us, request_id, key_id, model, input_count, "
                    "token_count, status, duration_us, replayed) VALUES "
                    f"({n // 2 * DAY_US}, 'r{n}', 'key_a', {model}, 1, {tokens}, {status}, 9, false)"
                )
            )

    store = SqlStore(engines, upgrades_itself=True)
    by_day = store.usage(UsageQuery(UsageBy.DAY))
    by_model = store.usage(UsageQuery(UsageBy.MODEL))

    assert [(line.requests, line.failed, line.tokens) for line in by_day] == [(2, 1, 7)] * 3
    assert by_model == [UsageLine(None, None, 3, 3, 0), UsageLine("m", None, 3, 0, 21)]
    with engines.reading.begin() as connection:
        assert connection.scalar(text("SELECT count(*) FROM ledger")) == 6


OF_0004 = (
    "INSERT INTO keys (id, name, scopes, models, requests_per_minute, tokens_per_minute, created_us, "
    "revision, truncate) VALUES ('key_a', 'a', 'admin embed', '[\"m\"]', 10, 100, 1, 1, 'end')",
    "INSERT INTO keys (id, name, scopes, created_us, revoked_us, revision) "
    "VALUES ('key_b', 'b', 'embed', 2, 3, 2)",
    "UPDATE keyring SET revision = 2",
    "INSERT INTO buckets VALUES ('key_a', 600000000, 420000000, 1700000000000000)",
    "INSERT INTO ledger (time_us, request_id, key_id, model, input_count, token_count, status, "
    "duration_us, replayed) VALUES (5, 'r1', 'key_a', 'm', 1, 7, 200, 9, false), "
    "(6, 'r2', 'key_a', 'm', 1, 0, 200, 9, true)",
    "INSERT INTO counts VALUES ('key_a', 'm', 404, 0, 3)",
    "INSERT INTO daily VALUES ('key_a', 'm', 0, 5, 3, 7)",
    "INSERT INTO timelines VALUES ('boot', 5, 6)",
)


def test_a_store_of_the_first_edition_keeps_its_keys_ledger_and_rate_limits(
    engines: Engines,
) -> None:
    """Schema 0004: it had idempotency keys and a timeline of its own."""
    with engines.writing.begin() as connection:
        tables.upgrade(connection, "0004")
        for statement in OF_0004:
            connection.execute(text(statement))
        claim = {"digest": b"d" * 16, "body": b"body"}
        insert = "INSERT INTO claims VALUES ('key_a', :digest, :body, 'us', 1, 2, true, 7)"
        connection.execute(text(insert), claim)

    store = SqlStore(engines, upgrades_itself=True)
    store.upgrade()

    a, b = sorted(store.keys_since(0).keys, key=lambda key: key.id)
    assert (a.name, a.limits, a.models, a.truncate) == (
        "a",
        RateLimits(10, 100),
        frozenset({"m"}),
        "end",
    )
    assert (b.name, b.revoked_us) == ("b", 3)
    (line,) = store.usage(UsageQuery(UsageBy.KEY))
    assert (line.requests, line.failed, line.tokens) == (5, 3, 7)
    with store.reading() as connection:
        rows = connection.execute(text("SELECT request_id, token_count FROM ledger ORDER BY 1"))
        assert [tuple(row) for row in rows] == [("r1", 7), ("r2", 0)]
    # All ten requests of the minute were spent, and a second has paid for none of them yet.
    spent = store.commit([ask(a.limits)], now_us=1_700_000_001_000_000).outcomes
    assert isinstance(spent[0], RateLimitExceeded)
    later = store.commit([ask(a.limits)], now_us=1_700_000_006_000_000).outcomes
    assert isinstance(later[0], Grant)
    with engines.writing.begin() as connection:
        assert differences(connection) == []
        with pytest.raises(DBAPIError, match="append-only"):
            connection.execute(text("DELETE FROM ledger"))


NOON_OF_DAY_1_US = DAY_US + DAY_US // 2
OF_0005 = (
    "INSERT INTO keys (id, name, scopes, requests_per_minute, created_us, revision) VALUES "
    "('key_a', 'a', 'embed', 2, 1, 1), ('key_b', 'b', 'embed', NULL, 1, 1)",
    "INSERT INTO buckets VALUES ('key_b', 0, 0, 5)",  # a has not been used
    "INSERT INTO daily VALUES ('key_a', 'm', 0, 5, 1, 40), ('key_b', 'm', 0, 2, 0, 9), "
    "('key_a', '', 1, 3, 3, 0), ('key_a', 'm', 1, 2, 0, 15)",
    f"UPDATE archive SET before_us = {DAY_US}",  # the rows of the first day are in a file
    "INSERT INTO ledger (time_us, request_id, key_id, model, input_count, token_count, status, "
    f"duration_us) VALUES ({NOON_OF_DAY_1_US}, 'r1', 'key_a', 'm', 1, 7, 200, 9), "
    f"({NOON_OF_DAY_1_US}, 'r2', 'key_a', 'm', 1, 8, 200, 9)",
    f"INSERT INTO counts VALUES ('key_a', '', 404, {NOON_OF_DAY_1_US // MINUTE_US}, 3)",
)


@pytest.mark.parametrize("schema", ["0005", "0006"])
def test_daily_totals_are_the_same_in_parts_and_go_on_and_their_rows_are_archived(
    engines: Engines, schema: str, tmp_path: Path
) -> None:
    with engines.writing.begin() as connection:
        tables.upgrade(connection, schema)
        for statement in OF_0005:
            connection.execute(text(statement))

    store = SqlStore(engines, upgrades_itself=True)

    def sums() -> list[tuple[str | None, int, int, int]]:
        queries = [UsageQuery(by) for by in UsageBy] + [UsageQuery(UsageBy.DAY, key_id="key_a")]
        return [
            (line.group, line.requests, line.failed, line.tokens)
            for query in queries
            for line in store.usage(query)
        ]

    first, second = ("1970-01-01", 7, 1, 49), ("1970-01-02", 5, 3, 15)
    before = [
        *[("key_a", 10, 4, 55), ("key_b", 2, 0, 9), (None, 3, 3, 0), ("m", 9, 1, 64)],
        *[first, second, ("1970-01-01", 5, 1, 40), second],
    ]
    assert sums() == before
    afternoon = UsageQuery(UsageBy.KEY, since_us=NOON_OF_DAY_1_US)
    assert [(line.requests, line.tokens) for line in store.usage(afternoon)] == [(5, 15)]
    with pytest.raises(FieldInvalid, match="rows are archived"):
        store.usage(UsageQuery(UsageBy.KEY, since_us=1))
    run = ArchiveRun(store, 2 * DAY_US, tmp_path / "old.gz", tmp_path, lambda _: None)
    assert run.run().rows == 2
    assert sums() == before

    entry = RecordUsage(a_row("r3", model="m", time_us=NOON_OF_DAY_1_US + 1))
    two = RateLimits(requests_per_minute=2)
    outcomes = store.commit([ask(two), ask(two), ask(two), entry], now_us=3 * DAY_US).outcomes
    assert [type(outcome) for outcome in outcomes[:3]] == [Grant, Grant, RateLimitExceeded]
    (later,) = store.usage(UsageQuery(UsageBy.DAY, since_us=DAY_US))
    assert (later.requests, later.failed, later.tokens) == (6, 3, 22)


def test_an_upgrade_takes_as_long_as_its_tables_are_large(engines: Engines) -> None:
    with engines.writing.begin() as connection:
        tables.upgrade(connection)
        if connection.dialect.name == "postgresql":
            assert connection.scalar(text("SHOW statement_timeout")) == "0"


def test_a_second_upgrade_changes_nothing(engines: Engines) -> None:
    store = SqlStore(engines, upgrades_itself=True)
    store.upgrade()
    before = store.revision()

    store.upgrade()

    assert store.revision() == before


def test_an_upgrade_that_fails_leaves_what_was_there(engines: Engines) -> None:
    with engines.writing.begin() as connection:
        tables.upgrade(connection, "0001")
        connection.execute(text("CREATE TABLE probe (in_the_way INTEGER)"))

    with pytest.raises(DBAPIError), engines.writing.begin() as connection:
        tables.upgrade(connection)

    with engines.writing.begin() as connection:
        assert tables.revision(connection) == "0001"
        connection.execute(text("DROP TABLE probe"))
        tables.upgrade(connection)
        assert differences(connection) == []


def test_a_server_does_not_upgrade_postgres_by_itself(engines: Engines) -> None:
    with pytest.raises(StoreRefused, match="run: trivec db upgrade"):
        SqlStore(engines, upgrades_itself=False).prepare()


def test_a_schema_from_the_future_is_refused(engines: Engines) -> None:
    with engines.writing.begin() as connection:
        tables.upgrade(connection)
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))

    for upgrades_itself in (True, False):
        with pytest.raises(StoreRefused, match="9999, newer"):
            SqlStore(engines, upgrades_itself=upgrades_itself).prepare()


@pytest.mark.parametrize(
    "statement",
    ["UPDATE ledger SET token_count = 0", "DELETE FROM ledger"],
    ids=["edited", "thinned"],
)
@pytest.mark.parametrize("schema", ["0001", "head"])
def test_the_ledger_cannot_be(engines: Engines, statement: str, schema: str) -> None:
    with engines.writing.begin() as connection:
        tables.upgrade(connection, "0001")
        for row in OLD_ROWS:
            connection.execute(text(row))
        tables.upgrade(connection, schema)

    with (
        pytest.raises(DBAPIError, match="append-only"),
        engines.writing.begin() as connection,
    ):
        connection.execute(text(statement))


def test_the_file_is_readable_by_its_owner_only(tmp_path: Path) -> None:
    engines = sqlite_engines(tmp_path / SQLITE_FILE)
    SqlStore(engines, upgrades_itself=True).prepare()
    with engines.writing.begin():
        modes = {file.name: file.stat().st_mode & 0o777 for file in tmp_path.iterdir()}
    engines.dispose()

    assert set(modes.values()) == {0o600}
    assert SQLITE_FILE in modes


def test_a_commit_is_on_disk_when_it_returns(tmp_path: Path) -> None:
    engines = sqlite_engines(tmp_path / SQLITE_FILE)
    with engines.writing.begin() as connection:
        journal = connection.scalar(text("PRAGMA journal_mode"))
        synchronous = connection.scalar(text("PRAGMA synchronous"))
    engines.dispose()

    assert (journal, synchronous) == ("wal", 2)  # 2 is FULL


def differences(connection: Connection) -> list[object]:
    """Between the tables as they are and as `schema` says."""
    context = MigrationContext.configure(connection, opts={"compare_server_default": False})
    return list(compare_metadata(context, tables.metadata))


def test_sqlite_is_new_enough_for_what_we_ask_of_it() -> None:
    assert sqlite3.sqlite_version_info >= (3, 35)  # RETURNING
