"""Schemathesis reads `/openapi.json` and asks what nobody would: no 5xx, no undocumented answer."""

import subprocess
import sys
from pathlib import Path

import pytest
from tests.process.server import Server

CHECKS = "not_a_server_error,response_schema_conformance,status_code_conformance"


def test_schemathesis_finds_no_server_error_and_no_undocumented_answer(
    server: Server, tmp_path: Path
) -> None:
    pytest.importorskip("schemathesis", reason="comes with: make test-clients")
    program = str(Path(sys.executable).with_name("schemathesis"))
    run = subprocess.run(
        [program, "run", f"{server.url}/openapi.json", "--checks", CHECKS, "--max-examples", "40",
         "--header", f"Authorization: Bearer {server.key}", "--seed", "1", "--no-color",
         "--exclude-path-regex", "^/admin/"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
