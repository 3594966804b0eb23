"""The official Node client, unchanged, through a real socket, under every prefix."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from tests.api.house import MODEL, PLAIN_MODEL, House

from trivec.api.app import PREFIXES

PROJECT = Path(__file__).resolve().parents[1] / "node"


@pytest.fixture(scope="module", params=PREFIXES)
def seen(request: pytest.FixtureRequest, shared_house: House, address: str) -> Any:
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")
    if not (PROJECT / "node_modules" / "openai").is_dir():
        pytest.skip(f"the npm packages are absent: npm ci in {PROJECT}")
    command = [node, "embeddings.mjs", address + request.param, shared_house.key, MODEL]
    ran = subprocess.run(
        command, cwd=PROJECT, capture_output=True, text=True, timeout=60, check=False
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


def test_its_default_encoding_and_floats_give_the_same_vector(seen: Any) -> None:
    assert seen["usual"] == seen["floats"]
    assert len(seen["usual"][0]) == 8


def test_it_reads_texts_and_token_ids_in_order(seen: Any) -> None:
    assert seen["several"][0] == seen["usual"][0]
    assert [len(seen[form]) for form in ("several", "ids", "lists")] == [2, 1, 2]


def test_a_dense_vector_that_was_not_asked_for_is_empty_to_it(seen: Any) -> None:
    assert seen["sparse"]["embedding"] == [[]]
    assert set(seen["sparse"]["sparse"]) == {"encoding", "indices", "values"}


def test_it_reads_usage_and_models(seen: Any) -> None:
    assert seen["usage"] == {"prompt_tokens": 7, "total_tokens": 7}
    assert seen["model"] == seen["shown"] == MODEL
    assert seen["models"] == [MODEL, PLAIN_MODEL]


def test_failures_are_its_own_typed_exceptions(seen: Any) -> None:
    assert seen["notFound"] == {
        "name": "NotFoundError",
        "status": 404,
        "code": "model_not_found",
        "param": "model",
    }
    assert seen["badInput"]["name"] == "BadRequestError"
    assert seen["badInput"]["param"] == "input[1]"
    assert seen["unauthorized"]["name"] == "AuthenticationError"
    assert seen["unauthorized"]["code"] == "invalid_api_key"
