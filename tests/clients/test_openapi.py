"""Schemathesis reads `/openapi.json` and asks what nobody would: no 5xx, no undocumented answer."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.process.server import Server, running

CHECKS = "not_a_server_error,response_schema_conformance,status_code_conformance"
FIXED_KEY = "a-fixed-key-which-nobody-can-revoke"


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[Server]:
    """A server that the administration may be tried on: its key opens it and stays."""
    with running(tmp_path, environ={"TRIVEC_API_KEY": FIXED_KEY}) as started:
        assert started.url
        yield started


def test_schemathesis_finds_no_server_error_and_no_undocumented_answer(
    own_server: Server, tmp_path: Path
) -> None:
    """Every operation, those of the administration too."""
    pytest.importorskip("schemathesis", reason="comes with: make test-clients")
    program = str(Path(sys.executable).with_name("schemathesis"))
    run = subprocess.run(
        [program, "run", f"{own_server.url}/openapi.json", "--checks", CHECKS,
         "--max-examples", "40", "--header", f"Authorization: Bearer {FIXED_KEY}",
         "--seed", "1", "--no-color"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
