"""What every suite may use: the shared data beside the checkout, where there is any."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real test data that is too large, or not ours, to keep in the repository."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"the shared test data is not at {folder}")
    return folder
