"""The major version of openai-python before the pinned one."""

import json
from pathlib import Path

import openai
from tests.clients.apart import run_apart
from tests.process.server import Server

PROGRAM = Path(__file__).with_name("old_openai.py")


def test_the_major_version_before_ours_works_unchanged(
    base_url: str, server: Server, tmp_path: Path
) -> None:
    program = PROGRAM.read_text("utf-8")
    seen = json.loads(run_apart(program, base_url, folder=tmp_path, OPENAI_API_KEY=server.key))
    assert int(seen["version"].split(".")[0]) == int(openai.__version__.split(".")[0]) - 1
    assert len(seen["embedding"]) == 384
    assert seen["async"] == seen["embedding"]
    assert (seen["indices"], seen["tokens"]) == ([0, 1], 5)
    assert seen["refused"] == "model_not_found"
