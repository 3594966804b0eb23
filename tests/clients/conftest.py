"""One real server for all the clients, on the small model's own weights."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.process.server import Server, running

MODEL = "all-minilm-l6-v2"
# Read when the libraries are imported: none of them may report to anybody.
os.environ.update(ANONYMIZED_TELEMETRY="False", HAYSTACK_TELEMETRY_ENABLED="False")


def assert_same_vectors(found: Any, expected: Sequence[Sequence[float]]) -> None:
    """To the bit; says in a line which are not, where pytest would compare them digit by digit."""
    ours, theirs = np.array(found, np.float32), np.array(expected, np.float32)
    assert ours.shape == theirs.shape
    different = np.flatnonzero((ours != theirs).any(axis=1)).tolist()
    largest = float(np.abs(ours - theirs).max(initial=0.0))
    assert not different, f"{len(different)} of {len(ours)} differ, by up to {largest}: {different}"


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder: Path = tmp_path_factory.mktemp("data")
    with running(folder) as started:
        assert started.url
        yield started


@pytest.fixture(params=["/v1", "/openai/v1", "/v3/openai"], ids=["v1", "openai", "novita"])
def base_url(request: pytest.FixtureRequest, server: Server) -> str:
    return server.url + str(request.param)
