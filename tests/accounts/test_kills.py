"""kill -9 at random instants: every 200 a client saw has exactly one row with equal tokens."""

import random
from pathlib import Path

import pytest
from sqlalchemy import select, text
from tests.accounts.processes import driver, long_or_short

from trivec.accounts.stores.engines import SQLITE_FILE, Engines, postgres_engines, sqlite_engines
from trivec.accounts.stores.sql import SqlStore
from trivec.accounts.stores.tables import ledger

KILLS = long_or_short(long=100, short=4)
IN_FLIGHT_MAX = 8
LINES_MAX = 400


@pytest.mark.process
@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_every_200_that_was_seen_has_its_row(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    url, engines = _empty(kind, tmp_path, request)
    dice = random.Random(9)
    seen: dict[str, int] = {}
    for kill in range(KILLS):
        with driver(tmp_path, url, "load", f"run{kill}") as process:
            assert process.stdout is not None
            for _ in range(dice.randrange(LINES_MAX)):
                _remember(process.stdout.readline(), seen)
            process.kill()
            for line in process.stdout:
                _remember(line, seen)

    with engines.reading.begin() as connection:
        found = connection.execute(select(ledger.c.request_id, ledger.c.token_count)).all()
        if kind == "sqlite":
            assert connection.scalar(text("PRAGMA integrity_check")) == "ok"
    engines.dispose()

    written = {row.request_id: row.token_count for row in found}
    assert len(written) == len(found)
    assert {name: written.get(name) for name in seen} == seen
    assert len(written) - len(seen) <= KILLS * IN_FLIGHT_MAX
    assert len(seen) > KILLS


def _remember(line: str, seen: dict[str, int]) -> None:
    if line.endswith("\n"):  # a kill may cut the last one
        request_id, tokens = line.split()
        seen[request_id] = int(tokens)


def _empty(kind: str, folder: Path, request: pytest.FixtureRequest) -> "tuple[str | None, Engines]":
    if kind == "sqlite":
        return None, sqlite_engines(folder / SQLITE_FILE)
    url = request.getfixturevalue("postgres").new_database()
    engines = postgres_engines(url)
    SqlStore(engines, upgrades_itself=False).upgrade()
    return url, engines
