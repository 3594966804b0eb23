"""What the README tells a newcomer to type works as it is written."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from tests.process.server import running

pytestmark = pytest.mark.process

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def test_the_two_commands_and_the_client_give_the_vector_that_is_shown(tmp_path: Path) -> None:
    make, curl = blocks("sh")[0].splitlines()
    assert make.startswith("make serve ")
    shown = json.loads(blocks("json")[0].replace(", …", ""))
    with running(tmp_path) as server:
        answer = subprocess.run(
            ["sh", "-c", curl.replace("http://127.0.0.1:8000", server.url)],
            env={"KEY": server.key, "PATH": "/usr/local/bin:/usr/bin:/bin"},
            capture_output=True,
            text=True,
            check=True,
        )
        said = json.loads(answer.stdout)
        program = blocks("python")[0].replace("http://127.0.0.1:8000", server.url)
        printed: list[list[float]] = []
        names: dict[str, Any] = {"KEY": server.key, "print": printed.append}
        exec(compile(program, "README.md", "exec"), names)
        names["client"].close()
    vector = said["data"][0].pop("embedding")
    begins = shown["data"][0].pop("embedding")
    assert said == shown
    assert len(vector) == 384
    assert vector[: len(begins)] == pytest.approx(begins, abs=2e-2)  # int8 differs by CPU
    assert printed[0] == vector
