"""Vercel's AI SDK, unchanged, through a real socket: embedMany and rerank."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.api.house import MODEL, RERANKER, House

PROJECT = Path(__file__).resolve().parents[1] / "node"


@pytest.fixture
def reranking_house() -> Iterator[House]:
    house = House(has_rerankers=True)
    yield house
    house.close()


def test_it_embeds_by_two_faces_and_reranks(reranking_house: House) -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")
    if not (PROJECT / "node_modules" / "ai").is_dir():
        pytest.skip(f"the npm packages are absent: npm ci in {PROJECT}")
    with reranking_house.listening() as address:
        ran = subprocess.run(
            [node, "ai_sdk.mjs", address, reranking_house.key, MODEL, RERANKER],
            cwd=PROJECT,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert ran.returncode == 0, ran.stderr
    seen = json.loads(ran.stdout)
    assert seen["many"] == seen["byCohere"]
    assert seen["one"] == seen["many"][0]
    assert seen["tokens"] == len("hello") + len("a") + 4
    [(_, best), (_, second)] = seen["ranked"]
    assert 1 > best > second > 0
