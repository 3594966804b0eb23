"""The code of README and docs runs: shell on a real server, fragments of Python on a stand-in for BGE-M3."""

import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from tests.api.house import CARD, House, StandIn
from tests.clients.test_use_pages import ADDRESS
from tests.process.server import TRIVEC, Server
from tests.support.blocks import Block, blocks

HOST = "http://HOST:8000"
# `serve` would stay: its arguments are read, and no more. Names in place of the fixture's server are
# its own, and so are the models that it does not have.
SHELL = """
set -euo pipefail
trivec() {{
    if [ "$1" = serve ]; then {python} -c '
import sys
from trivec.cli import load_command
load_command("serve").make_context("serve", sys.argv[2:])' "$@"
    else {trivec} "$@"; fi
}}
curl() {{ command curl --fail-with-body "$@"; }}
"""


@pytest.fixture(scope="module")
def house() -> Iterator[House]:
    house = House(model=StandIn(replace(CARD, token_count_max=256)))
    yield house
    house.close()


@pytest.fixture(scope="module")
def address(house: House) -> Iterator[str]:
    with house.listening() as address:
        yield address


@pytest.mark.parametrize(
    "one", [one for one in blocks("sh") if not one.reason], ids=lambda one: one.place
)
def test_shell_runs(one: Block, server: Server, tmp_path: Path) -> None:
    program = SHELL.format(python=sys.executable, trivec=TRIVEC) + one.text
    program = program.replace(ADDRESS, server.url).replace("baai/bge-m3", "all-minilm-l6-v2")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TRIVEC_")}
    data = str(tmp_path / "data")
    subprocess.run(
        [TRIVEC, "keys", "create", "--name", "first", "--create", "--data-dir", data],
        env=kept,
        capture_output=True,
        check=True,
    )
    ours = {"KEY": server.key, "BASE": f"{server.url}/v1", "TRIVEC_DATA_DIR": data}
    run = subprocess.run(
        ["bash", "-c", program],
        cwd=tmp_path,
        env=kept | ours,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize(
    "one", [one for one in blocks("py") if not one.reason], ids=lambda one: one.place
)
@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)
def test_a_fragment_of_python_runs(one: Block, house: House, address: str) -> None:
    cohere = pytest.importorskip("cohere", reason="comes with: make test-clients")
    ollama = pytest.importorskip("ollama", reason="comes with: make test-clients")
    qdrant = pytest.importorskip("qdrant_client", reason="comes with: make test-clients")
    from huggingface_hub import InferenceClient

    texts = ["the red house", "a red house by the sea", "green hills"]
    client = openai.OpenAI(base_url=f"{address}/v1", api_key=house.key)
    everything: dict[str, Any] = {"output_type": "dense&sparse&multi"}
    answer = client.embeddings.create(
        model=CARD.id, input=texts, encoding_format="float", extra_body=everything
    )
    names: dict[str, Any] = {
        "openai": openai,
        "OpenAI": openai.OpenAI,
        "cohere": cohere,
        "ollama": ollama,
        "InferenceClient": InferenceClient,
        "models": qdrant.models,
        "np": np,
        "client": client,
        "answer": answer,
        "KEY": house.key,
        "i": 1,
        "texts": texts,
        "query": texts[0],
        "documents": texts[1:],
    }
    exec(compile(one.text.replace(HOST, address), one.place, "exec"), names)
    client.close()
    names.clear()
    gc.collect()  # what a fragment left open says so now, and not after the last test
