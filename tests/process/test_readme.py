"""What README and the quick start tell a newcomer to type works as it is written."""

import json
import subprocess
from pathlib import Path

import pytest
from tests.process.server import running
from tests.support.blocks import blocks

pytestmark = pytest.mark.process


def test_the_two_commands_give_the_vector_that_is_shown(tmp_path: Path) -> None:
    with running(tmp_path) as server:
        environ = {"KEY": server.key, "PATH": "/usr/local/bin:/usr/bin:/bin"}
        for page in ("README.md", "docs/index.md"):
            start, *more = [one.text for one in blocks("sh") if one.page == page]
            curl = next(text for text in more if text.startswith("curl "))
            clone, make = start.splitlines()
            assert clone.startswith("git clone ")
            assert make.startswith("make serve ")
            command = ["sh", "-c", curl.replace("http://127.0.0.1:8000", server.url)]
            run = subprocess.run(command, env=environ, stdout=subprocess.PIPE, check=True)
            said = json.loads(run.stdout)
            text = next(one.text for one in blocks("json") if one.page == page)
            shown = json.loads(text.replace(', "…"', ""))
            vector = said["data"][0].pop("embedding")
            begins = shown["data"][0].pop("embedding")
            assert said == shown
            assert len(vector) == 384
            assert vector[: len(begins)] == pytest.approx(begins, abs=2e-2)  # int8 differs by CPU
