"""A whole server whose allowances go by a time that a test writes: `hand_timed.py DATA_DIR FILE`.

FILE holds microseconds, 8 bytes, little-endian; nothing refills while they stay as they are.
"""

import os
import sys
from pathlib import Path

from trivec.accounts.ledger import LedgerWriter
from trivec.cli.serve import run
from trivec.settings import load_settings


def main(data_dir: str, file: str) -> None:
    """Run the whole command, whose processes are forks of this one, on the time in *file*."""

    def now_us(self: LedgerWriter) -> int:
        return int.from_bytes(Path(file).read_bytes(), "little")

    LedgerWriter._now_us = now_us  # type: ignore[method-assign]
    chosen = {"data_dir": data_dir, "port": 0, "backend": "fake"}
    os._exit(run(load_settings(chosen, {})))


main(*sys.argv[1:])
