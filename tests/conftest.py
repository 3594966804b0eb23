"""What every suite may use: shared data where there is any, and a Postgres server of our own."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.accounts.postgres import PostgresServer, binaries, postgres_server


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real test data that is too large, or not ours, to keep in the repository."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"the shared test data is not at {folder}")
    return folder


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """A running server; each test takes a new database of it."""
    folder = binaries()
    if folder is None:
        pytest.skip("Postgres is not installed (no initdb on PATH or in /usr/lib/postgresql)")
    with postgres_server(folder) as server:
        yield server
