"""What every suite may use: shared data where there is any, and a Postgres server of our own."""

import os
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


# Continuous integration installs everything, so a skip there hides a missing step. Only these few
# things may be absent from it.
ABSENT_AT_TIMES = (
    "no CUDA device",
    "no network namespaces",
    "the shared test data",
    "this system does not say",
)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Where CI=true, fail a run that skipped what CI must have."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("CI") != "true" or reporter is None:
        return
    hidden = [
        report
        for report in reporter.stats.get("skipped", [])
        if not any(reason in str(report.longrepr) for reason in ABSENT_AT_TIMES)
    ]
    if hidden and session.exitstatus == pytest.ExitCode.OK:
        reporter.write_line(f"{len(hidden)} skips that CI=true does not allow", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
