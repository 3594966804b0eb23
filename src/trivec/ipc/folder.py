"""The folder that the processes share: the socket, and what each leaves for the others to read."""

import asyncio
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import msgspec

from trivec.core.types import ORDINARY_RULES, CertificateSummary, ModelCard, TokenRules

LOOK_EVERY_S = 0.05
METRICS_EVERY_S = 2.0  # between two pages of one process


class ServedModel(msgspec.Struct, frozen=True):
    """One model as an API process must know it."""

    card: ModelCard
    tokenizer_file: str
    certificate: CertificateSummary | None  # of its int8 arithmetic, where it has one
    rules: TokenRules = ORDINARY_RULES  # of its tokenizer


class Served(msgspec.Struct, frozen=True):
    """What the engine process runs, where, and why there."""

    version: str
    backend: str
    device: str
    reason: str
    slot_count: int
    models: tuple[ServedModel, ...]

    def is_same_service(self, other: "Served") -> bool:
        """Whether an API process made for *other* can go on; notes differ from start to start."""
        ours, theirs = (
            [(one.tokenizer_file, replace(one.card, notes={})) for one in served.models]
            for served in (self, other)
        )
        return self.version == other.version and ours == theirs

    def encode(self) -> bytes:
        return msgspec.json.encode(self, enc_hook=dict)

    @classmethod
    def decode(cls, text: bytes) -> "Served":
        return msgspec.json.decode(text, type=cls, dec_hook=lambda kind, value: kind(value))


class SharedFolder:
    """Files below *path*, which only our own user may enter. Each is replaced whole."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.endpoint = f"ipc://{path}/engine"

    def write_served(self, served: Served) -> None:
        self._write("served.json", served.encode())

    def read_served(self) -> Served:
        """What the engine process runs; blocks until it has loaded it for the first time."""
        file = self._path / "served.json"
        while not file.exists():
            time.sleep(LOOK_EVERY_S)
        return Served.decode(file.read_bytes())

    async def write_metrics_forever(self, process: str, page: Callable[[], bytes]) -> None:
        """Leave its *page*, in Prometheus's text format, for the other processes to show."""
        served = self._path / "served.json"
        while True:
            with suppress(OSError):  # a full disk: the page before stays
                self._write(f"{process}.metrics", page())
                os.utime(served)  # no cleaner of old files takes it
            await asyncio.sleep(METRICS_EVERY_S)

    def read_metrics(self) -> Mapping[str, bytes]:
        """The last page of each process, by its name."""
        return {file.stem: file.read_bytes() for file in self._path.glob("*.metrics")}

    async def all_serving(self, process: str, *, count: int) -> None:
        """Say that clients may come to *process*, and wait until they may to *count* of them."""
        self._write(f"{process}.serving", b"")
        while len(list(self._path.glob("*.serving"))) < count:  # noqa: ASYNC110 - other processes
            await asyncio.sleep(LOOK_EVERY_S)

    def _write(self, name: str, text: bytes) -> None:
        fresh = self._path / f".{name}.{os.getpid()}"
        fresh.write_bytes(text)
        fresh.replace(self._path / name)
