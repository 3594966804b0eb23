"""A tiny model to open or to damage, and a cache of the test's own."""

from pathlib import Path

import pytest
from tests.checkpoints.tiny import write_tiny


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sound tiny model, to be damaged."""
    return write_tiny(tmp_path / "tiny")


@pytest.fixture
def cache_dir(tmp_path: Path) -> Path:
    return tmp_path / "cache"
