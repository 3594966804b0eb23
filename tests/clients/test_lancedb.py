"""LanceDB's OpenAI function embeds what a table stores and what it is asked.

A table asks the function for its size, and LanceDB knows that of OpenAI's models only: for any other
it raises before it asks the server. A subclass that says the size is the remedy.
"""

import json
from pathlib import Path

from tests.clients.apart import run_apart
from tests.process.server import Server

PROGRAM = Path(__file__).with_name("lancedb_program.py")


def test_lancedb_embeds_rows_and_queries(base_url: str, server: Server, tmp_path: Path) -> None:
    program = PROGRAM.read_text("utf-8")
    seen = json.loads(run_apart(program, base_url, folder=tmp_path, OPENAI_API_KEY=server.key))
    assert "Unknown model name" in seen["refused"]
    assert seen["found"] == "A cat sits on the mat."
