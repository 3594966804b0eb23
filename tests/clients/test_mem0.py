"""mem0's OpenAI embedder, in an environment of its own: it wants an older protobuf than our tests."""

import json
import subprocess
from pathlib import Path

import pytest
from tests.process.server import Server

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / ".venv-openai" / "bin" / "python"
PROGRAM = Path(__file__).with_name("mem0_program.py")


def test_mem0_embeds_with_and_without_the_size(
    base_url: str, server: Server, tmp_path: Path
) -> None:
    if not PYTHON.exists():
        pytest.skip("the environment comes with: make test-clients")
    run = subprocess.run(
        [str(PYTHON), str(PROGRAM), base_url],
        env={
            "OPENAI_API_KEY": server.key,
            "MEM0_TELEMETRY": "False",
            "MEM0_DIR": str(tmp_path),
            "HOME": str(tmp_path),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    seen = json.loads(run.stdout)
    assert len(seen["plain"]) == 384
    assert seen["sized"] == seen["plain"] == seen["batch"][0]
