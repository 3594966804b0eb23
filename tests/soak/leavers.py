"""Clients that leave while they are queued, being computed, or receiving their answer.

Run: python -m tests.soak.leavers [--clients 2000]

A third each, over real sockets. Who left the line must never be computed; nobody is billed who left
before the answer was there; afterwards the line, tasks and file descriptors are as they were.
"""

import asyncio
import itertools
import json
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tests.soak.report import Report, command
from tests.soak.service import MODEL, Service

from trivec.backends.fake import FakeBackend
from trivec.settings import HttpLimits, Settings

GROUP = 50  # at a time: well under the cap on connections
FIRST_ID = 2_000  # ids that stand for clients: real words of the vocabulary
LARGE_INPUTS = 400  # of an answer too large for the socket
SETTLE_S_MAX = 20.0
RECEIVE_BYTES = 4096


class Scene:
    """The service, who has knocked, and what became of them."""

    def __init__(self, service: Service, address: tuple[str, int]) -> None:
        self.service = service
        self.address = address
        self.ids = itertools.count(FIRST_ID)
        assert isinstance(service.inner, FakeBackend)
        self.device: FakeBackend = service.inner

    def knock(self, token_lists: list[list[int]]) -> socket.socket:
        """A client that has sent its request."""
        made = socket.socket()
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BYTES)
        made.connect(self.address)
        body = json.dumps({"model": MODEL, "input": token_lists}).encode()
        made.sendall(
            b"POST /v1/embeddings HTTP/1.1\r\nHost: service\r\nContent-Type: application/json\r\n"
            b"Authorization: Bearer %b\r\nContent-Length: %d\r\n\r\n%b"
            % (self.service.key.encode(), len(body), body)
        )
        return made

    def waiting(self) -> int:
        """Requests in the queue."""
        return self.service.engine.queued_requests

    def tasks(self) -> int:
        return len(asyncio.all_tasks(self.service.loop))

    def rows(self) -> int:
        """How many requests are written down, a row each or in a count."""
        store = self.service.store
        return len(store.rows) + sum(store.counts.values())

    def computed(self) -> set[int]:
        """Every token id that the device has seen."""
        seen = [call.batch.token_ids for call in self.device.ran]
        return set(np.concatenate(seen).tolist()) if seen else set()


def until(holds: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + SETTLE_S_MAX
    while not holds():
        assert time.monotonic() < deadline_s, "it never came to that"
        time.sleep(0.005)


def leave_the_line(scene: Scene, count: int) -> int:
    """*count* clients leave while others hold the device; how many were computed all the same."""
    scene.service.faulty.entered.clear()
    scene.service.faulty.gate.clear()
    holder = scene.knock([[next(scene.ids)]])
    assert scene.service.faulty.entered.wait(5)
    ids = [next(scene.ids) for _ in range(count)]
    rows = scene.rows()
    leavers = [scene.knock([[one]]) for one in ids]
    until(lambda: scene.waiting() == count)
    for leaver in leavers:
        leaver.close()
    until(lambda: scene.rows() == rows + count and scene.waiting() == 0)
    scene.service.faulty.gate.set()
    holder.recv(RECEIVE_BYTES)
    holder.close()
    return len(scene.computed() & set(ids))


def leave_computing(scene: Scene, count: int) -> None:
    """*count* clients leave while a batch of theirs is on the device."""
    rows = scene.rows()
    for _ in range(count):
        scene.service.faulty.entered.clear()
        scene.service.faulty.gate.clear()
        leaver = scene.knock([[next(scene.ids)]])
        assert scene.service.faulty.entered.wait(5)
        leaver.close()
        rows += 1
        until(lambda expected=rows: scene.rows() == expected)  # type: ignore[misc]
        scene.service.faulty.gate.set()


def leave_receiving(scene: Scene, count: int) -> None:
    """*count* clients leave with most of their answer still to come."""
    rows = scene.rows()
    large = [[next(scene.ids)]] * LARGE_INPUTS
    leavers = [scene.knock(large) for _ in range(count)]
    for leaver in leavers:
        assert leaver.recv(RECEIVE_BYTES).startswith(b"HTTP/1.1 200 ")
        leaver.close()
    until(lambda: scene.rows() == rows + count)


def run(clients: int = 2000) -> Report:
    report = Report()
    third = max(1, clients // 3)
    settings = Settings(http=HttpLimits(answer_chunk_bytes=16 * 1024))
    with tempfile.TemporaryDirectory() as folder:
        service = Service(Path(folder), settings=settings)
        with service.listening() as address:
            scene = Scene(service, address)
            leave_receiving(scene, 1)
            until(lambda: scene.tasks() <= 6)
            fds, tasks = open_files(), scene.tasks()
            scene.device.ran.clear()
            computed = sum(leave_the_line(scene, size) for size in groups(third))
            leave_computing(scene, third)
            before = scene.rows()
            early = service.store.rows[1:]
            unpaid = sum(n for count, n in service.store.counts.items() if count.status == 499)
            for size in groups(third):
                leave_receiving(scene, size)
                scene.device.ran.clear()
            until(lambda: scene.tasks() <= tasks and open_files() <= fds)
            billed = sum(row.token_count for row in early if row.status == 499)
            report.at_least("left while queued or computing", unpaid, 2 * third)
            report.at_most("share of the queued that were computed", computed / third, 0.01)
            report.at_most("tokens billed to them", billed, 0)
            report.at_most("requests still in line", scene.waiting(), 0)
            report.at_most("tasks too many", scene.tasks() - tasks, 0)
            report.at_most("file descriptors too many", open_files() - fds, 0)
            receiving = scene.rows() - before
            report.figures["left_receiving"] = receiving
    return report


def groups(count: int) -> list[int]:
    return [GROUP] * (count // GROUP) + ([count % GROUP] if count % GROUP else [])


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


if __name__ == "__main__":
    command("leavers", __doc__, run, clients=2000)
