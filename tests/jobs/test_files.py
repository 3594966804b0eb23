"""Files while they are written."""

import asyncio
from pathlib import Path
from threading import Event
from typing import IO

from trivec.jobs.files import PIECE_BYTES, FileStorage, FileWriter


class Slow(FileStorage):
    """Makes a file once it may go on."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.begun, self.goes_on, self.made = Event(), Event(), Event()

    def create(self, key_id: str, name: str) -> IO[bytes]:
        self.begun.set()
        self.goes_on.wait(60)
        opened = super().create(key_id, name)
        self.made.set()
        return opened


async def test_what_is_aborted_while_it_is_written_is_gone(tmp_path: Path) -> None:
    """A task can be cancelled; the thread that writes for it goes on."""
    storage = Slow(str(tmp_path))
    writer = FileWriter(storage, "key_a", "file")
    writing = asyncio.create_task(writer.write(bytes(PIECE_BYTES)))
    await asyncio.to_thread(storage.begun.wait, 60)
    writing.cancel()
    await asyncio.wait([writing])
    aborting = asyncio.create_task(writer.abort())
    await asyncio.wait([aborting], timeout=0.5)  # it waits for the thread, or it is wrong
    storage.goes_on.set()
    await asyncio.to_thread(storage.made.wait, 60)
    await aborting
    assert list((tmp_path / "key_a").iterdir()) == []
