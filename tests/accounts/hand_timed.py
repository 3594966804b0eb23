"""A whole server whose rate limits go by a time that a test writes: `hand_timed.py DATA_DIR FILE`.

FILE holds microseconds, 8 bytes, little-endian; nothing refills while they stay as they are.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from trivec.accounts.ledger import Committed, Entry
from trivec.accounts.stores.sql import SqlStore
from trivec.cli.serve import run
from trivec.settings import load_settings


def main(data_dir: str, file: str) -> None:
    """Run the whole command, whose processes are forks of this one, on the time in *file*."""
    commit = SqlStore.commit

    def commit_then(self: SqlStore, entries: Sequence[Entry], *, now_us: int) -> Committed:
        then_us = int.from_bytes(Path(file).read_bytes(), "little")
        return replace(commit(self, entries, now_us=then_us), now_us=now_us)

    SqlStore.commit = commit_then  # type: ignore[method-assign]
    chosen = {"data_dir": data_dir, "port": 0, "backend": "fake"}
    os._exit(run(load_settings(chosen, {})))


main(*sys.argv[1:])
