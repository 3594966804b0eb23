"""The store behind pgbouncer in transaction mode, where each transaction may have another session."""

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Event

import pytest
from tests.accounts.postgres import PostgresServer, free_port
from tests.accounts.requests import acquire, closing, opening
from tests.accounts.shelf import NOON_US, Shelf, a_key, a_row, ask

from trivec.accounts import Accounts, KeyPlan, RateLimits, UsageBy, UsageQuery
from trivec.accounts.ledger import RecordUsage
from trivec.accounts.rate_limits import Grant
from trivec.accounts.stores.engines import postgres_engines
from trivec.accounts.stores.sql import SqlStore
from trivec.core.clock import SystemClock
from trivec.core.errors import KeyInvalid, StoreRefused

CONFIG = """
[databases]
* = user=trivec host=127.0.0.1 port={postgres_port}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = any
pool_mode = transaction
default_pool_size = 3
server_round_robin = 1
"""


@contextmanager
def pgbouncer(server: PostgresServer) -> Iterator[int]:
    """The port of one before *server*, whose sessions take turns."""
    program = shutil.which("pgbouncer", path=f"{os.environ['PATH']}:/usr/sbin")
    if program is None:
        pytest.skip("pgbouncer is not installed")
    port = free_port()
    file = server.folder / "pgbouncer.ini"
    file.write_text(CONFIG.format(postgres_port=server.port, port=port))
    with subprocess.Popen(
        [program, str(file)],
        user=server.user,  # it refuses root, as Postgres does
        stderr=subprocess.PIPE,
        cwd="/",
        text=True,
    ) as process:
        assert process.stderr is not None
        said = ""
        while "process up" not in said:
            line = process.stderr.readline()
            assert line, said
            said += line
        process.stderr.close()
        yield port
        process.kill()


@pytest.fixture
def pooled(postgres: PostgresServer) -> Iterator[Shelf]:
    """Stores that reach their database through pgbouncer."""
    direct = postgres.upgraded_database()
    with pgbouncer(postgres) as port:
        url = direct.replace(f":{postgres.port}/", f":{port}/")
        shelf = Shelf(lambda: SqlStore(postgres_engines(url), upgrades_itself=False))
        yield shelf
        shelf.close()


def test_all_that_a_store_does_many_times_works_in_any_session(pooled: Shelf) -> None:
    one, other = pooled.open(), pooled.open()
    limits = RateLimits(1_000, 100_000)
    one.add_key(a_key("a", limits))
    for number in range(20):  # more often than a driver asks for before it prepares a statement
        store = (one, other)[number % 2]
        row = RecordUsage(a_row(f"r{number}"), limits)
        kinds = [
            type(outcome) for outcome in store.commit([ask(limits), row], now_us=NOON_US).outcomes
        ]
        assert kinds == [Grant, Grant]
        assert store.commit([], now_us=NOON_US).outcomes == []
        assert len(store.keys_since(0).keys) == 1
        assert store.usage(UsageQuery(UsageBy.KEY))[0].tokens == 7 * (number + 1)


async def test_nodes_hear_of_a_revoked_key_by_asking(pooled: Shelf) -> None:
    nodes = [
        Accounts(pooled.open(), clock=SystemClock(), secret=b"s" * 32, shared=True)
        for _ in range(2)
    ]
    for accounts in nodes:
        accounts.start()
    new = await nodes[0].create_key(KeyPlan("t", limits=RateLimits(1_000)))
    for accounts in nodes:
        caller = await accounts.identify(new.plain)
        await (await acquire(accounts, caller, opening())).close(closing())

    await nodes[0].revoke_key("t")
    revoked_s = time.monotonic()

    with pytest.raises(KeyInvalid):
        await nodes[0].identify(new.plain)
    is_refused = False
    while not is_refused and time.monotonic() - revoked_s < 1:
        with suppress(KeyInvalid):
            await nodes[1].identify(new.plain)
            continue
        is_refused = True
    assert is_refused
    for accounts in nodes:
        accounts.stop()


def test_it_does_not_listen_where_nothing_is_to_be_heard(pooled: Shelf) -> None:
    store = pooled.open()
    heard: list[None] = []

    store.listen(lambda: heard.append(None), Event())  # comes back

    assert heard == []


def test_an_archive_wants_a_session_of_its_own(pooled: Shelf) -> None:
    store = pooled.open()
    assert isinstance(store, SqlStore)
    with pytest.raises(StoreRefused, match="pgbouncer"), store.archiving():
        pass
