"""The server killed or hung, again and again, and started each time as a service manager does.

Run: python -m tests.soak.kills [--times 20]

Clients may see their connections reset. `/readyz` must not say 200 before the next request is
answered. A call may take a second here before it counts as hung, so that a run does not wait.
"""

import signal
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import httpx
from tests.process.server import Server
from tests.soak.report import Report, command
from tests.soak.stands import embed, ready_again, stand

BACK_S_MAX = 20.0
BROKEN = 70


def kill(server: Server) -> None:
    server.signal(signal.SIGKILL)
    assert server.exit_code() == -signal.SIGKILL


def hang(server: Server) -> None:
    """A request whose call never ends; whoever waits beside it must be told to come back."""
    told: list[httpx.Response] = []

    def send() -> None:
        with suppress(httpx.TransportError):
            told.append(embed(server.url, "hang"))

    senders = [threading.Thread(target=send) for _ in range(2)]
    for sender in senders:
        sender.start()
    for sender in senders:
        sender.join()
    assert [one.status_code for one in told] == [503, 503], told
    assert all("retry-after" in one.headers for one in told)
    assert server.exit_code() == BROKEN


WAYS: dict[str, Callable[[Server], None]] = {"killed": kill, "hung": hang}


def run(times: int = 20) -> Report:
    report = Report()
    for name, way in WAYS.items():
        with tempfile.TemporaryDirectory() as folder:
            took_s = [_once(Path(folder), way) for _ in range(times)]
        report.at_least(f"times {name} and back, ready only when it answers", len(took_s), times)
        report.at_most(f"seconds until it was back from being {name}", max(took_s), BACK_S_MAX)
    return report


def _once(folder: Path, way: Callable[[Server], None]) -> float:
    with stand(folder, "--call-s-min", "1") as server:
        began_s = time.perf_counter()
        way(server)
    with stand(folder, "--call-s-min", "1") as server:
        ready_again(server.url, within_s=BACK_S_MAX)
        return time.perf_counter() - began_s


if __name__ == "__main__":
    command("kills", __doc__, run, times=20)
