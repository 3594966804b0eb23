"""Where the books are kept: memory, SQLite, Postgres. One contract, `store.Store`, for all three."""

from trivec.accounts.stores.opening import open_accounts, open_administration, open_store

__all__ = ["open_accounts", "open_administration", "open_store"]
