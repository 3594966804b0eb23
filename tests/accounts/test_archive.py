"""Old ledger rows move into a file: none lost, none twice, whenever the run is cut off."""

import gzip
import json
import os
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, select, text
from tests.accounts.shelf import a_row, latest_sqlite

from trivec.accounts import UsageBy, UsageLine, UsageQuery
from trivec.accounts.archive import HEADER, NOTE, Archived, ArchiveFile, ArchiveRun
from trivec.accounts.ledger import RecordUsage
from trivec.accounts.stores.engines import SQLITE_FILE, Engines, postgres_engines, sqlite_engines
from trivec.accounts.stores.sql import SqlStore
from trivec.accounts.stores.tables import ledger
from trivec.accounts.utc import DAY_US
from trivec.core.errors import FieldInvalid, SettingInvalid, StoreRefused

BEFORE_US = 20_000 * DAY_US
BATCH_ROWS = 4
OLD_ROWS = 10


class Crash(BaseException):
    """As if the process were killed here: nothing catches it."""


@pytest.fixture(params=["sqlite", "postgres"])
def engines(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Engines]:
    if request.param == "sqlite":
        (tmp_path / SQLITE_FILE).write_bytes(latest_sqlite())
        made = sqlite_engines(tmp_path / SQLITE_FILE)
    else:
        made = postgres_engines(request.getfixturevalue("postgres").upgraded_database())
    yield made
    made.dispose()


@pytest.fixture
def store(engines: Engines) -> Iterator[SqlStore]:
    with closing(SqlStore(engines, upgrades_itself=True)) as made:
        yield made


def fill(store: SqlStore, name: str = "r") -> None:
    """Old rows, two of each instant; one of the day of the mark; two failures of one old minute."""
    times = [BEFORE_US - DAY_US + n // 2 * 3_600_000_000 for n in range(OLD_ROWS)]
    rows = [a_row(f"{name}{n}", time_us=time_us) for n, time_us in enumerate(times)]
    rows.append(a_row(f"{name}-new", time_us=BEFORE_US, token_count=5))
    rows += [
        a_row(f"{name}-failed{n}", time_us=times[0], status=404, token_count=0) for n in range(2)
    ]
    store.commit([RecordUsage(row) for row in rows], now_us=BEFORE_US)


def run(
    store: Any,
    folder: Path,
    file: str = "old.jsonl.gz",
    *,
    told: Callable[[int], None] = lambda _: None,
) -> Archived:
    return ArchiveRun(store, BEFORE_US, folder / file, folder, told, BATCH_ROWS).run()


def here(store: SqlStore) -> list[dict[str, Any]]:
    rows = select(ledger).order_by(ledger.c.time_us, ledger.c.sequence)
    with store.reading() as connection:
        return [dict(row) for row in connection.execute(rows).mappings()]


def archived(*files: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for file in files for line in gzip.open(file)]


def sums(store: SqlStore) -> list[list[UsageLine]]:
    queries = [UsageQuery(by) for by in UsageBy]
    queries.append(UsageQuery(UsageBy.DAY, BEFORE_US - DAY_US, BEFORE_US))
    return [store.usage(query) for query in queries]


def test_rows_move_and_totals_stay(store: SqlStore, tmp_path: Path) -> None:
    fill(store)
    rows, before = here(store), sums(store)

    done = run(store, tmp_path)

    file = tmp_path / "old.jsonl.gz"
    assert archived(file) == rows[:OLD_ROWS]
    assert here(store) == rows[OLD_ROWS:]
    assert sums(store) == before
    assert done == Archived(OLD_ROWS, file.stat().st_size, file)
    assert file.stat().st_mode & 0o777 == 0o600
    assert not (tmp_path / NOTE).exists()


def test_counts_of_old_minutes_are_dropped(
    store: SqlStore, engines: Engines, tmp_path: Path
) -> None:
    fill(store)
    late = a_row("late", time_us=BEFORE_US, status=404, token_count=0)
    store.commit([RecordUsage(late)], now_us=BEFORE_US)
    run(store, tmp_path)
    with engines.reading.begin() as connection:
        minutes = connection.execute(text("SELECT minute FROM counts")).scalars().all()
    assert minutes == [BEFORE_US // 60_000_000]


def test_parts_of_archived_days_are_refused(store: SqlStore, tmp_path: Path) -> None:
    fill(store)
    run(store, tmp_path)
    for since_us, until_us, param in [
        (BEFORE_US - 1, None, "since"),
        (None, BEFORE_US - 1, "until"),
        (BEFORE_US - 5, BEFORE_US - 1, "since"),
    ]:
        with pytest.raises(FieldInvalid, match="whole UTC days only") as refused:
            store.usage(UsageQuery(UsageBy.KEY, since_us, until_us))
        assert refused.value.param == param
    (line,) = store.usage(UsageQuery(UsageBy.KEY, BEFORE_US, BEFORE_US + 1))
    assert line.tokens == 5


def test_a_second_run_goes_on_in_the_same_file(store: SqlStore, tmp_path: Path) -> None:
    fill(store)
    first = run(store, tmp_path)
    assert run(store, tmp_path) == Archived(0, first.byte_count, first.file)
    fill(store, "s")
    assert run(store, tmp_path).rows == OLD_ROWS
    ids = [row["request_id"] for row in archived(tmp_path / "old.jsonl.gz")]
    assert len(set(ids)) == len(ids) == 2 * OLD_ROWS


def test_nothing_to_move_makes_no_file(store: SqlStore, tmp_path: Path) -> None:
    store.prepare()
    assert run(store, tmp_path) == Archived(0, 0, None)
    assert not (tmp_path / "old.jsonl.gz").exists()


def crashing_at(monkeypatch: pytest.MonkeyPatch, store: SqlStore, step: int) -> None:
    """The *step*-th sync of a file or change of the store: odd ones before it, even ones after."""
    steps = iter(range(1_000))
    sync, change = os.fsync, store.writing

    def may_crash() -> None:
        if next(steps) == step:
            raise Crash

    def syncing(descriptor: int) -> None:
        may_crash()
        sync(descriptor)
        may_crash()

    @contextmanager
    def changing() -> Iterator[Connection]:
        may_crash()
        with change() as connection:
            yield connection
        may_crash()

    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(store, "writing", changing)


@pytest.mark.parametrize(
    ("engines", "second"),
    [("sqlite", "old.jsonl.gz"), ("sqlite", "other.jsonl.gz"), ("postgres", "other.jsonl.gz")],
    indirect=["engines"],
)
def test_a_crash_at_any_step_loses_and_doubles_nothing(
    store: SqlStore, tmp_path: Path, second: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)  # a thousand would wait for the disk
    crashes = 0
    for step in range(1_000):
        folder = tmp_path / str(step)
        folder.mkdir()
        fill(store, f"r{step}-")
        rows, before = here(store), sums(store)
        with pytest.MonkeyPatch.context() as patch:
            crashing_at(patch, store, step)
            try:
                run(store, folder)
                break
            except Crash:
                crashes += 1
        run(store, folder, second)
        found = archived(*sorted(folder.glob("*.gz")))
        key = lambda row: (row["time_us"], row["sequence"])  # noqa: E731
        assert sorted(found + here(store), key=key) == sorted(rows, key=key), f"step {step}"
        assert sums(store) == before
    assert crashes > 15


@pytest.mark.parametrize("cut_bytes", [1, 30])
def test_a_torn_last_member_is_cut_off(store: SqlStore, tmp_path: Path, cut_bytes: int) -> None:
    fill(store)
    rows = here(store)
    with pytest.MonkeyPatch.context() as patch:
        crashing_at(patch, store, 12)  # before the second batch leaves the store
        with pytest.raises(Crash):
            run(store, tmp_path)
    file = tmp_path / "old.jsonl.gz"
    os.truncate(file, file.stat().st_size - cut_bytes)

    run(store, tmp_path)

    assert archived(file) == rows[:OLD_ROWS]


def test_rows_in_a_file_of_an_earlier_schema_are_settled(store: SqlStore, tmp_path: Path) -> None:
    """The ledger had one more column when that run was cut off."""
    fill(store)
    rows = here(store)[:OLD_ROWS]
    with closing(ArchiveFile(tmp_path / "old.jsonl.gz")) as file:
        file.append([{**row, "replayed": False} for row in rows])

    run(store, tmp_path)

    ids = [row["request_id"] for row in archived(tmp_path / "old.jsonl.gz")]
    assert ids == [row["request_id"] for row in rows]


def test_a_file_damaged_in_its_middle_or_of_something_else_is_left_alone(
    store: SqlStore, tmp_path: Path
) -> None:
    fill(store)
    run(store, tmp_path)
    file = tmp_path / "old.jsonl.gz"
    content = bytearray(file.read_bytes())
    content[len(HEADER) + 9] ^= 255
    for there in (bytes(content), b"dear diary"):
        file.write_bytes(there)
        for is_noted in (True, False):
            (tmp_path / NOTE).unlink(missing_ok=True)
            if is_noted and there != b"dear diary":
                (tmp_path / NOTE).write_bytes(os.fsencode(file))
            with pytest.raises(SettingInvalid, match="damaged from byte 0"):
                run(store, tmp_path)
            assert file.read_bytes() == there


def test_a_full_disk_takes_back_what_is_half_written(
    store: SqlStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(store)
    rows = here(store)
    sync = os.fsync
    calls = iter(range(1_000))

    def full(descriptor: int) -> None:
        if next(calls) == 4:  # the second batch
            raise OSError(28, "No space left on device")
        sync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(SettingInvalid, match="No space left on device"):
            run(store, tmp_path)
    assert archived(tmp_path / "old.jsonl.gz") + here(store) == rows
    assert not (tmp_path / NOTE).exists()


def test_the_file_of_a_run_cut_off_must_be_there(store: SqlStore, tmp_path: Path) -> None:
    fill(store)
    (tmp_path / NOTE).write_bytes(os.fsencode(tmp_path / "gone"))
    with pytest.raises(SettingInvalid, match="put it back"):
        run(store, tmp_path)
    (tmp_path / NOTE).unlink()
    with pytest.raises(SettingInvalid, match="No such file"):
        run(store, tmp_path, "no/such/folder")


def test_two_runs_at_once_are_refused(store: SqlStore, engines: Engines, tmp_path: Path) -> None:
    fill(store)
    other = tmp_path if engines.writing.dialect.name == "sqlite" else tmp_path / "elsewhere"

    def meanwhile(_: int) -> None:
        with (
            closing(SqlStore(twin, upgrades_itself=False)) as second,
            pytest.raises(StoreRefused, match="another trivec db archive"),
        ):
            run(second, other)

    url = engines.writing.url.render_as_string(hide_password=False)
    is_sqlite = engines.writing.dialect.name == "sqlite"
    twin = sqlite_engines(tmp_path / SQLITE_FILE) if is_sqlite else postgres_engines(url)
    run(store, tmp_path, told=meanwhile)
    twin.dispose()
