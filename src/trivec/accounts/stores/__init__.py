"""Where the books are kept: memory, SQLite, Postgres. One contract, `store.Store`, for all three."""
