"""The house that most suites of the HTTP room share."""

from collections.abc import Iterator

import pytest
from tests.api.house import House


@pytest.fixture
def house() -> Iterator[House]:
    """A house of its own for one test, without a socket."""
    house = House()
    yield house
    house.close()


@pytest.fixture(scope="module")
def shared_house() -> Iterator[House]:
    """A house for a whole module; nobody may hold, break or reconfigure it."""
    house = House()
    yield house
    house.close()


@pytest.fixture(scope="module")
def address(shared_house: House) -> Iterator[str]:
    """Where the shared house listens: `http://127.0.0.1:port`."""
    with shared_house.listening() as address:
        yield address
