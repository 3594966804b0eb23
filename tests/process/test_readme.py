"""What README and the quick start tell a newcomer to type works as it is written."""

import json
import subprocess
from pathlib import Path

import pytest
from tests.process.server import running
from tests.support.blocks import blocks

pytestmark = pytest.mark.process


@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_the_two_commands_give_the_vector_that_is_shown(page: str, tmp_path: Path) -> None:
    start, curl = [one for one in blocks("sh") if one.page == page][:2]
    clone, make = start.text.splitlines()
    assert clone.startswith("git clone ")
    assert make.startswith("make serve ")
    text = next(one.text for one in blocks("json") if one.page == page)
    shown = json.loads(text.replace(', "…"', ""))
    with running(tmp_path) as server:
        answer = subprocess.run(
            ["sh", "-c", curl.text.replace("http://127.0.0.1:8000", server.url)],
            env={"KEY": server.key, "PATH": "/usr/local/bin:/usr/bin:/bin"},
            capture_output=True,
            text=True,
            check=True,
        )
    said = json.loads(answer.stdout)
    vector = said["data"][0].pop("embedding")
    begins = shown["data"][0].pop("embedding")
    assert said == shown
    assert len(vector) == 384
    assert vector[: len(begins)] == pytest.approx(begins, abs=2e-2)  # int8 differs by CPU
