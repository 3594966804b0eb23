"""From settings to a store, its secret, and what stands on them."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from trivec.accounts.accounts import Accounts
from trivec.accounts.administration import Administration
from trivec.accounts.secret import check_secret, server_secret
from trivec.accounts.stores.connect import SQLITE_FILE, postgres_engines, sqlite_engines
from trivec.accounts.stores.memory import MemoryStore
from trivec.accounts.stores.sql import SqlStore
from trivec.core.errors import SettingInvalid, StoreUnavailable
from trivec.core.ports import Clock
from trivec.settings import Settings

MEMORY_SECRET = b"nothing that outlives the process"


def open_accounts(settings: Settings, *, clock: Clock) -> Accounts:
    """What a server needs. Raises `StartError`; a store that is away for now is no reason to."""
    if settings.no_auth:
        return Accounts(MemoryStore(), clock=clock, secret=MEMORY_SECRET, no_auth=True)
    secret = _secret(settings)
    store = open_store(settings)
    try:
        store.prepare()
        check_secret(store, secret)
    except StoreUnavailable:
        pass  # the writer tries again every second; until then the server is not ready
    fixed = settings.api_key
    return Accounts(
        store,
        clock=clock,
        secret=secret,
        fixed_key=None if fixed is None else fixed.get_secret_value(),
    )


@contextmanager
def open_administration(settings: Settings, *, clock: Clock) -> Iterator[Administration]:
    """What a command needs. Raises `StartError`, and `StoreUnavailable` when the store is away."""
    secret = _secret(settings)
    with closing(open_store(settings)) as store:
        store.prepare()
        check_secret(store, secret)
        yield Administration(store, clock=clock, secret=secret)


def open_store(settings: Settings) -> SqlStore:
    """Postgres where its URL is set, else the SQLite file in the data folder; touches neither."""
    if settings.database_url is not None:
        engines = postgres_engines(settings.database_url.get_secret_value())
        return SqlStore(engines, upgrades_itself=False)
    file = _data_dir(settings) / SQLITE_FILE
    return SqlStore(sqlite_engines(file), upgrades_itself=True)


def sqlite_file(settings: Settings) -> Path | None:
    """Where the store of these settings is, or will be; None where it is a Postgres."""
    return settings.data_dir / SQLITE_FILE if settings.database_url is None else None


def _secret(settings: Settings) -> bytes:
    given = settings.secret
    return server_secret(
        _data_dir(settings), given=None if given is None else given.get_secret_value()
    )


def _data_dir(settings: Settings) -> Path:
    folder = settings.data_dir
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as fault:
        raise SettingInvalid(
            f"data_dir {folder} cannot be made: {fault.strerror}; choose another with --data-dir"
        ) from fault
    return folder
