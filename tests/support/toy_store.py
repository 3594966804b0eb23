"""A store in one file: what somebody writes who keeps the ledger elsewhere, here in a text file."""

from collections.abc import Sequence
from pathlib import Path

from tests.support.memory_store import MemoryStore

from trivec.accounts.ledger import Committed, Entry


class ToyStore(MemoryStore):
    """Keys and buckets in memory; each billed request is a line of *file*: key, model, tokens."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self._file = file

    def commit(self, entries: Sequence[Entry], *, now_us: int) -> Committed:
        before = len(self.rows)
        committed = super().commit(entries, now_us=now_us)
        with self._file.open("a", encoding="utf-8") as out:
            for row in self.rows[before:]:
                print(row.key_id, row.model, row.token_count, file=out)
        return committed
