"""Files while they are written."""

import asyncio
from pathlib import Path
from threading import Event
from typing import IO

import pytest

from trivec.core.errors import StoreUnavailable
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


class Committing(FileStorage):
    """Has a file only once it is closed, as object storage has, and waits with that to be told."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.begun, self.goes_on = Event(), Event()

    def sync(self, file: IO[bytes], key_id: str, name: str) -> None:
        self.begun.set()
        self.goes_on.wait(60)
        Path(self._path(key_id, name)).touch()
        super().sync(file, key_id, name)


async def abort_meanwhile(
    writer: FileWriter, task: "asyncio.Task[None]", storage: Slow | Committing
) -> None:
    """Cancel *task* while its thread waits in *storage*, and abort; then let the thread go on."""
    await asyncio.to_thread(storage.begun.wait, 60)
    task.cancel()
    await asyncio.wait([task])
    aborting = asyncio.create_task(writer.abort())
    await asyncio.wait([aborting], timeout=0.5)  # it waits for the thread, or it is wrong
    storage.goes_on.set()
    await aborting


async def test_what_is_aborted_while_it_is_written_is_gone(tmp_path: Path) -> None:
    """A task can be cancelled; the thread that writes for it goes on."""
    storage = Slow(str(tmp_path))
    writer = FileWriter(storage, "key_a", "file")
    writing = asyncio.create_task(writer.write(bytes(PIECE_BYTES)))
    await abort_meanwhile(writer, writing, storage)
    assert storage.made.is_set()
    assert list((tmp_path / "key_a").iterdir()) == []


async def test_what_is_aborted_while_it_is_finished_is_gone(tmp_path: Path) -> None:
    storage = Committing(str(tmp_path))
    writer = FileWriter(storage, "key_a", "file")
    await writer.write(b"content")
    closing = asyncio.create_task(writer.close())
    await abort_meanwhile(writer, closing, storage)
    await asyncio.get_running_loop().shutdown_default_executor()
    assert list((tmp_path / "key_a").iterdir()) == []


def test_a_place_that_is_away_when_the_server_starts_does_not_stop_it() -> None:
    storage = FileStorage("ftp://127.0.0.1:1/files")
    with pytest.raises(StoreUnavailable):
        storage.open("key_a", "file")
