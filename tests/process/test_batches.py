"""A batch on a real server that is killed, and on several API processes before one engine."""

from pathlib import Path

import pytest
from tests.process.batches import (
    check,
    input_lines,
    run_batch_through_kills,
    sqlite_ledger,
    submit,
    wait_until_ended,
)
from tests.process.server import running

pytestmark = pytest.mark.process

FAKE = ("--backend", "fake")
NO_GRACE = {"TRIVEC_LIFE__DRAIN_GRACE_S": "0"}


def test_killed_at_random_it_answers_and_bills_each_line_once(tmp_path: Path) -> None:
    """The short form: `tests/reference/test_batches.py` has the long ones."""
    found = run_batch_through_kills(
        [tmp_path], FAKE, line_count=3_000, kills=3, seed=7, environ=NO_GRACE, pause_s=0.8
    )
    check(found, sqlite_ledger(tmp_path), 3_000)
    parts = [path for path in (tmp_path / "files").rglob("*") if "batch_" in path.name]
    assert parts == []  # all are joined and gone


def test_it_runs_before_one_engine_process_and_goes_on_after_a_drain(tmp_path: Path) -> None:
    environ = {**NO_GRACE, "TRIVEC_API_PROCESSES": "2"}
    with running(tmp_path, *FAKE, environ=environ) as server, server.client() as client:
        batch_id = submit(client, input_lines(500))
        key = server.key
        server.process.terminate()
        assert server.exit_code() == 0
    with running(tmp_path, *FAKE, environ=NO_GRACE) as server:
        import httpx

        headers = {"Authorization": f"Bearer {key}"}
        with httpx.Client(base_url=server.url, headers=headers, timeout=60) as client:
            batch = wait_until_ended(client, batch_id)
    assert batch["status"] == "completed"
    assert batch["request_counts"] == {"total": 500, "completed": 495, "failed": 5}
