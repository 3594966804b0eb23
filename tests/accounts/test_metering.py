"""The audit: what the ledger says is what the clients were told, to the token.

Clients retry as the SDKs do: some answers are lost on the way back and sent for again under the
same idempotency key, some requests fail and are sent again without one.
"""

import asyncio
import random
from collections import Counter

import pytest
from tests.accounts.processes import long_or_short
from tests.accounts.requests import acquire, closing, opening, plan_of
from tests.accounts.shelf import Shelf, postgres_shelf, sqlite_shelf

from trivec.accounts import Accounts, Caller, KeyPlan, UsageBy, UsageQuery
from trivec.core.clock import SystemClock
from trivec.core.errors import IdempotencyInProgress

KEYS = 50
CONNECTIONS = 16
REQUESTS = long_or_short(long=100_000, short=3_000)
WORDS = ("river", "stone", "cloud", "amber", "fjord")


def tokenized(text: str) -> int:
    """Any function of the text will do, as long as both sides use it."""
    return len(text.split()) + 2


class Client:
    """One connection: sends requests with any of the keys, keeps its own accounts of each."""

    def __init__(self, processes: list[Accounts], callers: list[Caller], *, seed: int) -> None:
        self._processes = processes
        self._callers = callers
        self._dice = random.Random(seed)
        self.seed = seed
        self.billed: Counter[str] = Counter()  # tokens by key id, as the answers said
        self.texts: Counter[str] = Counter()  # the same, counted again from the texts

    async def send_many(self, count: int) -> None:
        for number in range(count):
            caller = self._dice.choice(self._callers)
            text = " ".join(self._dice.choices(WORDS, k=self._dice.randrange(1, 200)))
            name = f"{self.seed}-{number}" if self._dice.random() < 0.3 else None
            await self._send(caller, text, name)

    async def _send(self, caller: Caller, text: str, name: str | None) -> None:
        if self._dice.random() < 0.1:
            await self._ask(caller, text, name, status=503)
        times = self._dice.choice([1, 1, 2, 3]) if name is not None else 1
        for _ in range(times):  # every answer but the last is lost on the way
            is_billed = await self._ask(caller, text, name, status=200)
            if is_billed:
                self.billed[caller.key_id] += tokenized(text)
        self.texts[caller.key_id] += tokenized(text)

    async def _ask(self, caller: Caller, text: str, name: str | None, *, status: int) -> bool:
        """Whether the answer was a 200 that was billed."""
        process = self._dice.choice(self._processes)
        asked = opening(idempotency_key=name, body=text.encode())
        booking = await acquire(process, caller, asked, tokens_follow=self._dice.random() < 0.5)
        await booking.reserve_tokens(tokenized(text))
        await booking.close(closing(status, tokens=tokenized(text)))
        return status == 200 and not booking.replayed


@pytest.fixture(params=["sqlite", "postgres"])
def shelf(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    if request.param == "sqlite":
        return sqlite_shelf(tmp_path_factory.mktemp("books"))
    return postgres_shelf(request.getfixturevalue("postgres").new_database())


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
    assert ledger == sum((client.texts for client in clients), Counter())
    assert ledger.total() > REQUESTS


async def test_of_many_with_one_idempotency_key_at_once_exactly_one_is_billed(
    shelf: Shelf,
) -> None:
    processes = processes_over(shelf)
    new = await processes[0].create_key(KeyPlan("t"))
    caller = await processes[1].identify(new.plain)

    async def send(process: Accounts) -> str:
        try:
            booking = await acquire(process, caller, opening(idempotency_key="one"))
        except IdempotencyInProgress:
            return "in progress"
        await booking.close(closing(tokens=7))
        return "replayed" if booking.replayed else "billed"

    seen = Counter(await asyncio.gather(*(send(processes[n % 2]) for n in range(200))))

    (line,) = await processes[0].usage(UsageQuery(UsageBy.KEY))
    for accounts in processes:
        accounts.stop()
    shelf.close()
    assert seen["billed"] == 1
    assert line.tokens == 7
