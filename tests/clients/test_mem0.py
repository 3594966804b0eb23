"""mem0's OpenAI embedder, which wants an older protobuf than our tests."""

import json
from pathlib import Path

from tests.clients.apart import run_apart
from tests.process.server import Server

PROGRAM = Path(__file__).with_name("mem0_program.py")


def test_mem0_embeds_with_and_without_the_size(
    base_url: str, server: Server, tmp_path: Path
) -> None:
    environment = {"MEM0_TELEMETRY": "False", "MEM0_DIR": str(tmp_path)}
    printed = run_apart(
        PROGRAM.read_text("utf-8"),
        base_url,
        folder=tmp_path,
        OPENAI_API_KEY=server.key,
        **environment,
    )
    seen = json.loads(printed)
    assert len(seen["plain"]) == 384
    assert seen["sized"] == seen["plain"] == seen["batch"][0]
