"""The serving process killed, stopped or hung, again and again: it is back without anybody.

Run: python -m benchmarks.soak.kills [--times 20]

Clients may see their connections reset. `/readyz` must not say 200 before the next request is
answered. The bounds on heartbeats are a second here, so that a run does not wait for them.
"""

import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import httpx
from benchmarks.soak.report import Report, command
from benchmarks.soak.stands import embed, ready_again, stand
from tests.process.server import Server

HEARTBEAT_S_MAX = 1.0
BACK_S_MAX = 20.0
ENVIRON = {"TRIVEC_LIFE__HEARTBEAT_S_MAX": str(HEARTBEAT_S_MAX)}


def kill(server: Server) -> None:
    os.kill(server.child(), signal.SIGKILL)


def stop(server: Server) -> None:
    os.kill(server.child(), signal.SIGSTOP)


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


WAYS: dict[str, Callable[[Server], None]] = {"killed": kill, "stopped": stop, "hung": hang}


def run(times: int = 20) -> Report:
    report = Report()
    for name, way in WAYS.items():
        with (
            tempfile.TemporaryDirectory() as folder,
            stand(Path(folder), "--call-s-min", "1", environ=ENVIRON) as server,
        ):
            took_s = [_once(server, way, count) for count in range(times)]
        report.at_least(f"times {name} and back, ready only when it answers", len(took_s), times)
        report.at_most(f"seconds until it was back from being {name}", max(took_s), BACK_S_MAX)
    return report


def _once(server: Server, way: Callable[[Server], None], count: int) -> float:
    child = server.child()
    began_s = time.perf_counter()
    way(server)
    server.wait_until_it_says("started again", times=count + 1)
    ready_again(server.url, within_s=BACK_S_MAX)
    server.wait_until_it_says("is ready", times=count + 2)
    assert server.child() != child
    return time.perf_counter() - began_s


if __name__ == "__main__":
    command("kills", __doc__, run, times=20)
