"""A place where books are kept, and as many stores over it as a test wants processes."""

from collections.abc import Callable
from contextlib import closing
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.accounts.postgres import PostgresServer
from tests.support.memory_store import MemoryStore

from trivec.accounts.ledger import LedgerRow, Reserve, Store
from trivec.accounts.rate_limits import Cost
from trivec.accounts.stores.engines import SQLITE_FILE, postgres_engines, sqlite_engines
from trivec.accounts.stores.sql import SqlStore
from trivec.accounts.types import Key, RateLimits, Scope, Secret

SECOND_US = 1_000_000
NOON_US = 1_700_000_000 * SECOND_US


class Shelf:
    """Opens stores over the same books and closes them all."""

    def __init__(self, open_store: Callable[[], Store]) -> None:
        self._open_store = open_store
        self._opened: list[Store] = []

    def open(self) -> Store:
        """As another process would."""
        store = self._open_store()
        self._opened.append(store)
        return store

    def close(self) -> None:
        for store in self._opened:
            store.close()


def memory_shelf() -> Shelf:
    store = MemoryStore()
    return Shelf(lambda: store)


@cache
def latest_sqlite() -> bytes:
    """A SQLite file with the latest schema and nothing in it: migrations take longer than a test."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / SQLITE_FILE
        with closing(SqlStore(sqlite_engines(file), upgrades_itself=True)) as store:
            store.prepare()
        return file.read_bytes()


def sqlite_shelf(folder: Path) -> Shelf:
    (folder / SQLITE_FILE).write_bytes(latest_sqlite())
    return Shelf(lambda: SqlStore(sqlite_engines(folder / SQLITE_FILE), upgrades_itself=True))


def postgres_shelf(server: PostgresServer) -> Shelf:
    url = server.upgraded_database()
    return Shelf(lambda: SqlStore(postgres_engines(url), upgrades_itself=False))


def a_key(name: str, allowance: RateLimits | None = None) -> Key:
    """A key named *name*, whose id is its name."""
    secret = Secret(name.encode().ljust(32, b"-"), "tv_AAAAA", "zzzz", created_us=NOON_US)
    return Key(
        f"key_{name}",
        name,
        frozenset({Scope.EMBED}),
        None,
        allowance or RateLimits(),
        created_us=NOON_US,
        secrets=(secret,),
    )


def a_row(request_id: str, **changes: object) -> LedgerRow:
    """One successful request of 7 tokens at noon."""
    values: dict[str, object] = {
        "time_us": NOON_US,
        "request_id": request_id,
        "key_id": "key_a",
        "model": "minilm",
        "input_count": 1,
        "token_count": 7,
        "status": 200,
        "duration_us": 1500,
        "user_digest": None,
    }
    return LedgerRow(**(values | changes))  # type: ignore[arg-type]


ONE_REQUEST = Cost(requests=1)


def ask(limits: RateLimits, cost: Cost = ONE_REQUEST) -> Reserve:
    """A reservation for `key_a`."""
    return Reserve("key_a", limits, cost)
