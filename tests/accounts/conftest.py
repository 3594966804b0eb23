"""One process's accounts over a store in memory, and a hand-moved clock."""

from collections.abc import Callable, Iterator

import pytest
from tests.hand_clock import HandClock
from tests.support.memory_store import MemoryStore

from trivec.accounts import Accounts

SECRET = b"a secret of the tests, 32 bytes."


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
def process(store: MemoryStore, clock: HandClock) -> Iterator[Callable[..., Accounts]]:
    """Starts accounts over the same store, as another server process would."""
    started: list[Accounts] = []

    def start(**settings: object) -> Accounts:
        made = Accounts(store, clock=clock, secret=SECRET, **settings)  # type: ignore[arg-type]
        made.start()
        started.append(made)
        return made

    yield start
    for accounts in started:
        accounts.stop()


@pytest.fixture
def accounts(process: Callable[..., Accounts]) -> Accounts:
    return process()
