"""The audit: what the ledger says is what the clients were told, to the token.

Some requests fail and are sent again.
"""

import asyncio
import random
from collections import Counter

import pytest
from tests.accounts.processes import long_or_short
from tests.accounts.requests import acquire, closing, opening, plan_of
from tests.accounts.shelf import Shelf, postgres_shelf, sqlite_shelf

from trivec.accounts import Accounts, Key, UsageBy, UsageQuery
from trivec.core.clock import SystemClock

KEYS = 50
CONNECTIONS = 16
REQUESTS = long_or_short(long=100_000, short=3_000)
WORDS = ("river", "stone", "cloud", "amber", "fjord")


def tokenized(text: str) -> int:
    """Any function of the text will do, as long as both sides use it."""
    return len(text.split()) + 2


class Client:
    """One connection: sends requests with any of the keys, keeps its own accounts of each."""

    def __init__(self, processes: list[Accounts], callers: list[Key], *, seed: int) -> None:
        self._processes = processes
        self._callers = callers
        self._dice = random.Random(seed)
        self.billed: Counter[str] = Counter()  # tokens by key id

    async def send_many(self, count: int) -> None:
        for _ in range(count):
            caller = self._dice.choice(self._callers)
            text = " ".join(self._dice.choices(WORDS, k=self._dice.randrange(1, 200)))
            if self._dice.random() < 0.1:
                await self._ask(caller, text, status=503)
            await self._ask(caller, text, status=200)
            self.billed[caller.id] += tokenized(text)

    async def _ask(self, caller: Key, text: str, *, status: int) -> None:
        process = self._dice.choice(self._processes)
        follow = self._dice.random() < 0.5
        booking = await acquire(process, caller, opening(), tokens_follow=follow)
        await booking.reserve_tokens(tokenized(text))
        await booking.close(closing(status, tokens=tokenized(text)))


@pytest.fixture(params=["sqlite", "postgres"])
def shelf(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    if request.param == "sqlite":
        return sqlite_shelf(tmp_path_factory.mktemp("books"))
    return postgres_shelf(request.getfixturevalue("postgres"))


def processes_over(shelf: Shelf) -> list[Accounts]:
    started = [Accounts(shelf.open(), clock=SystemClock(), secret=b"s" * 32) for _ in range(2)]
    for accounts in started:
        accounts.start()
    return started


async def test_the_ledger_is_the_sum_of_what_clients_were_told(shelf: Shelf) -> None:
    processes = processes_over(shelf)
    callers = []
    for number in range(KEYS):
        new = await processes[0].create_key(plan_of(number))
        callers.append(await processes[0].identify(new.plain))
    clients = [Client(processes, callers, seed=seed) for seed in range(CONNECTIONS)]

    await asyncio.gather(*(client.send_many(REQUESTS // CONNECTIONS) for client in clients))

    lines = await processes[1].usage(UsageQuery(UsageBy.KEY))
    ledger = Counter({line.group: line.tokens for line in lines})
    for accounts in processes:
        accounts.stop()
    shelf.close()
    assert ledger == sum((client.billed for client in clients), Counter())
    assert ledger.total() > REQUESTS
