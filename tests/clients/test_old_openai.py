"""The major version of openai-python before the pinned one, in an environment of its own."""

import json
import subprocess
from pathlib import Path

import openai
import pytest
from tests.process.server import Server

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / ".venv-openai" / "bin" / "python"
PROGRAM = Path(__file__).with_name("old_openai.py")


def test_the_major_version_before_ours_works_unchanged(base_url: str, server: Server) -> None:
    if not PYTHON.exists():
        pytest.skip("the environment comes with: make test-clients")
    run = subprocess.run(
        [str(PYTHON), str(PROGRAM), base_url],
        env={"OPENAI_API_KEY": server.key},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    seen = json.loads(run.stdout)
    assert int(seen["version"].split(".")[0]) == int(openai.__version__.split(".")[0]) - 1
    assert len(seen["embedding"]) == 384
    assert seen["async"] == seen["embedding"]
    assert (seen["indices"], seen["tokens"]) == ([0, 1], 5)
    assert seen["refused"] == "model_not_found"
