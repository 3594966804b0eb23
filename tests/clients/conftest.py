"""One real server for all the clients, on the small model's own weights."""

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.process.server import Server, running

MODEL = "all-minilm-l6-v2"
# It imports LanceDB, which comes with: make test-clients.
collect_ignore = [] if importlib.util.find_spec("lancedb") else ["test_lancedb.py"]
# Read when the libraries are imported: none of them may report to anybody.
os.environ.update(ANONYMIZED_TELEMETRY="False", HAYSTACK_TELEMETRY_ENABLED="False")


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder: Path = tmp_path_factory.mktemp("data")
    with running(folder) as started:
        assert started.url
        yield started


@pytest.fixture(params=["/v1", "/openai/v1", "/v3/openai"], ids=["v1", "openai", "novita"])
def base_url(request: pytest.FixtureRequest, server: Server) -> str:
    return server.url + str(request.param)
