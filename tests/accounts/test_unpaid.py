"""Requests that cost no tokens: however many they are, the store grows by a bounded number of rows."""

import asyncio
from pathlib import Path

from sqlalchemy import func, select
from tests.api.house import MODEL, House

from trivec.accounts import RateLimits, UsageBy, UsageQuery
from trivec.accounts.stores.engines import SQLITE_FILE, sqlite_engines
from trivec.accounts.stores.sql import SqlStore
from trivec.accounts.stores.tables import counts, ledger

TIMES = 1_000
ROWS_MAX = 3 * 4  # three kinds of request, and as many minutes as it may take


def test_a_key_of_one_request_a_minute_cannot_fill_the_disk(tmp_path: Path) -> None:
    engines = sqlite_engines(tmp_path / SQLITE_FILE)
    store = SqlStore(engines, upgrades_itself=True)
    house = House(store=store)  # type: ignore[arg-type]
    try:
        tokens = asyncio.run(ask_for_nothing(house))
        with engines.reading.begin() as connection:
            assert connection.scalar(select(func.count()).select_from(ledger)) == 1
            assert (connection.scalar(select(func.count()).select_from(counts)) or 0) <= ROWS_MAX
        lines = store.usage(UsageQuery(UsageBy.KEY))
    finally:
        house.close()

    (line,) = [line for line in lines if line.requests > 1]
    assert (line.requests, line.failed) == (1 + 3 * TIMES, 2 * TIMES)
    assert line.tokens == tokens


async def ask_for_nothing(house: House) -> int:
    """One good request, whose tokens it returns, and many that cost none."""
    json = {"content-type": "application/json"}
    key = await house.new_key_async("one", RateLimits(requests_per_minute=1))
    async with house.client(key) as client:
        good = await client.post("/embeddings", json={"model": MODEL, "input": "a"})
        assert good.status_code == 200
        for _ in range(TIMES):
            assert (await client.get("/models")).status_code == 200
            unknown = {"model": "nope", "input": "a"}
            assert (await client.post("/embeddings", json=unknown)).status_code == 404
            bad = await client.post("/embeddings", content=b"{", headers=json)
            assert bad.status_code == 400
    return int(good.json()["usage"]["total_tokens"])
