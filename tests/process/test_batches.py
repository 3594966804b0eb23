"""A batch on a real server that is killed, and on several API processes before one engine."""

import os
from pathlib import Path

import httpx
import pytest
from tests.accounts.processes import ON_A_DISK_OF_ITS_OWN, ROOT
from tests.process.batches import (
    check,
    input_lines,
    run_batch_through_kills,
    sqlite_ledger,
    submit,
    wait_until_ended,
)
from tests.process.server import TRIVEC, running, started

pytestmark = pytest.mark.process

FAKE = ("--backend", "fake")
NO_GRACE = {"TRIVEC_LIFE__DRAIN_GRACE_S": "0"}


def test_killed_at_random_it_answers_and_bills_each_line_once(tmp_path: Path) -> None:
    """The short form: `tests/reference/test_batches.py` has the long ones."""
    found = run_batch_through_kills(
        [tmp_path], FAKE, line_count=3_000, kills=2, seed=7, environ=NO_GRACE, pause_s=0.8
    )
    check(found, sqlite_ledger(tmp_path), 3_000)


def test_it_runs_before_one_engine_process_and_goes_on_after_a_drain(tmp_path: Path) -> None:
    environ = {**NO_GRACE, "TRIVEC_API_PROCESSES": "2"}
    with running(tmp_path, *FAKE, environ=environ) as server, server.client() as client:
        batch_id = submit(client, input_lines(500))
        key = server.key
        server.process.terminate()
        assert server.exit_code() == 0
    with running(tmp_path, *FAKE, environ=NO_GRACE) as server:
        headers = {"Authorization": f"Bearer {key}"}
        with httpx.Client(base_url=server.url, headers=headers, timeout=60) as client:
            batch = wait_until_ended(client, batch_id)
    assert batch["status"] == "completed"
    assert batch["request_counts"] == {"total": 500, "completed": 495, "failed": 5}


def test_a_disk_that_is_full_holds_it_up_and_loses_nothing(tmp_path: Path) -> None:
    """The files are on a small disk of their own: what is deleted there makes room to go on."""
    folder, data_dir = tmp_path / "disk", tmp_path / "data"
    folder.mkdir()
    rights = "--mount" if os.geteuid() == ROOT else "-Urm"
    prefix = ["unshare", rights, "sh", "-c", ON_A_DISK_OF_ITS_OWN, "2000k", str(folder)]
    command = [*prefix, TRIVEC, "serve", "--port", "0", "--data-dir", str(data_dir), *FAKE]
    environ = {**NO_GRACE, "TRIVEC_BATCH__FILES": str(folder)}
    with started(command, environ) as server, server.client() as client:
        form = {"purpose": "batch"}

        def upload(size: int) -> httpx.Response:
            return client.post("/v1/files", files={"file": ("x", b"x" * size)}, data=form)

        ballast = upload(1_300_000).json()["id"]
        too_large = upload(1_000_000)
        batch_id = submit(client, input_lines(100))  # whose answers take 800,000 bytes, twice
        server.wait_until_it_says("batches wait: .*No space left on device")
        waiting = client.get(f"/v1/batches/{batch_id}").json()
        assert client.delete(f"/v1/files/{ballast}").status_code == 200
        batch = wait_until_ended(client, batch_id)
        alive = client.get("/readyz")
    assert (too_large.status_code, too_large.json()["error"]["code"]) == (503, "store_unavailable")
    assert "No space left on device" in too_large.text
    assert waiting["status"] == "in_progress"
    assert batch["request_counts"] == {"total": 100, "completed": 99, "failed": 1}
    assert alive.status_code == 200
