"""Stores of the accounts, SQLite and Postgres, chosen by the settings."""

from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from trivec.accounts.accounts import Accounts
from trivec.accounts.administration import Administration, check_secret
from trivec.accounts.keys import server_secret
from trivec.accounts.stores.engines import (
    SQLITE_FILE,
    memory_engines,
    postgres_engines,
    sqlite_engines,
)
from trivec.accounts.stores.sql import SqlStore
from trivec.core.errors import SettingInvalid, StoreUnavailable
from trivec.core.ports import Clock
from trivec.settings import Settings

__all__ = ["open_accounts", "open_administration", "open_job_store", "open_store", "sqlite_file"]

KEYLESS_FILE = "batches.sqlite3"  # of a server without keys
MEMORY_SECRET = b"nothing that outlives the process"


def open_accounts(settings: Settings, *, clock: Clock) -> Accounts:
    """For a server. Raises `StartError`, but not where the store is unavailable for now."""
    if settings.no_auth:
        store = SqlStore(memory_engines(), upgrades_itself=True)
        return Accounts(store, clock=clock, secret=MEMORY_SECRET, no_auth=True)
    secret = _secret(settings)
    store = open_store(settings)
    try:
        store.prepare()
        check_secret(store, secret)
    except StoreUnavailable:
        pass  # the writer tries again every second; until then the server is not ready
    fixed_key = settings.api_key.get_secret_value() if settings.api_key is not None else None
    shared = settings.database_url is not None
    return Accounts(store, clock=clock, secret=secret, fixed_key=fixed_key, shared=shared)


@contextmanager
def open_administration(settings: Settings, *, clock: Clock) -> Iterator[Administration]:
    """For a command. Raises `StartError` and `StoreUnavailable`."""
    secret = _secret(settings)
    with closing(open_store(settings)) as store:
        store.prepare()
        check_secret(store, secret)
        yield Administration(store, clock=clock, secret=secret)


def open_store(settings: Settings) -> SqlStore:
    """Postgres where its URL is set, else the SQLite file in the data folder; connects later."""
    if settings.database_url is not None:
        engines = postgres_engines(settings.database_url.get_secret_value())
        return SqlStore(engines, upgrades_itself=False)
    file = _data_dir(settings) / SQLITE_FILE
    return SqlStore(sqlite_engines(file), upgrades_itself=True)


def open_job_store(settings: Settings) -> SqlStore:
    """For files and batch jobs, with connections of its own; connects later.

    A server without keys has a file too: a batch job outlives the process that began it.
    """
    if not settings.no_auth:
        return open_store(settings)
    with suppress(OSError):  # a server without keys starts all the same
        settings.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    return SqlStore(sqlite_engines(settings.data_dir / KEYLESS_FILE), upgrades_itself=True)


def sqlite_file(settings: Settings) -> Path | None:
    """The file of the store of these settings, which may not exist yet; None for Postgres."""
    return settings.data_dir / SQLITE_FILE if settings.database_url is None else None


def _secret(settings: Settings) -> bytes:
    given = settings.secret.get_secret_value() if settings.secret is not None else None
    return server_secret(_data_dir(settings), given=given)


def _data_dir(settings: Settings) -> Path:
    folder = settings.data_dir
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as fault:
        raise SettingInvalid(
            f"data_dir {folder} cannot be made: {fault.strerror}; choose another with --data-dir"
        ) from fault
    return folder
