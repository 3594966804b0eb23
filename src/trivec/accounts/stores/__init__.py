"""Where the books are kept: memory, SQLite, Postgres. One contract, `store.Store`, for all three."""

from trivec.accounts.stores.opening import (
    open_accounts,
    open_administration,
    open_store,
    sqlite_file,
)

__all__ = ["open_accounts", "open_administration", "open_store", "sqlite_file"]
