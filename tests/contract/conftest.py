"""Every kind of store, empty, that can be opened a second time as another process would."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.accounts.shelf import Shelf, memory_shelf, postgres_shelf, sqlite_shelf


@pytest.fixture(params=["memory", "sqlite", "postgres"])
def shelf(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Shelf]:
    match request.param:
        case "memory":
            made = memory_shelf()
        case "sqlite":
            made = sqlite_shelf(tmp_path)
        case _:
            made = postgres_shelf(request.getfixturevalue("postgres"))
    yield made
    made.close()
