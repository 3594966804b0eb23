"""Whole batches on real servers and real weights that are killed at random moments. A minute each.

`TRIVEC_TEST_KILLS=20 TRIVEC_TEST_LINES=20000 make test-reference ARGS=tests/reference/test_batches.py`
is the long form: from four minutes each.
"""

import os
from pathlib import Path

import psycopg
import pytest
from tests.accounts.postgres import PostgresServer
from tests.process.batches import check, run_batch_through_kills, sqlite_ledger

pytestmark = pytest.mark.reference

KILLS = int(os.environ.get("TRIVEC_TEST_KILLS", "6"))
LINES = int(os.environ.get("TRIVEC_TEST_LINES", "6000"))
NO_GRACE = {"TRIVEC_LIFE__DRAIN_GRACE_S": "0"}
WORDS = 120  # of a line: the batch must not be done before the last kill
PAUSE_S = 2.0  # at most, from a start to the next kill


def test_one_server_on_sqlite(tmp_path: Path) -> None:
    found = run_batch_through_kills(
        [tmp_path],
        [],
        line_count=LINES,
        kills=KILLS,
        seed=1,
        environ=NO_GRACE,
        pause_s=PAUSE_S,
        words=WORDS,
    )
    check(found, sqlite_ledger(tmp_path), LINES)
    assert found["killed"] == KILLS


def test_two_servers_on_postgres_with_one_queue(tmp_path: Path, postgres: PostgresServer) -> None:
    url = postgres.upgraded_database()
    environ = {
        **NO_GRACE,
        "TRIVEC_DATABASE_URL": url,
        "TRIVEC_API_KEY": "a-fixed-key-of-the-tests",
        "TRIVEC_SECRET": "a secret of the tests, of 32 bytes",
        "TRIVEC_BATCH__FILES": str(tmp_path / "files"),
    }
    folders = [tmp_path / "one", tmp_path / "two"]
    found = run_batch_through_kills(
        folders,
        [],
        line_count=LINES,
        kills=KILLS,
        seed=2,
        environ=environ,
        pause_s=PAUSE_S,
        words=WORDS,
    )
    with psycopg.connect(url) as connection:
        ledger = connection.execute("SELECT request_id, status, token_count FROM ledger").fetchall()
    check(found, ledger, LINES)
    assert found["killed"] == KILLS
