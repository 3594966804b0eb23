"""Hours of ordinary life in minutes: texts of all lengths, clients that hang up, nonsense between.

Run: python -m tests.soak.soak [--minutes 30] [--backend openvino|fake]

Lengths are log-normal; a fifth of the requests is abandoned, one in twenty is wrong, one in twenty
comes with a wrong key. Memory, files,
threads and tasks of the serving process are read throughout. The first third is warm-up: memory is
judged by its slope over the rest, latency by the last third against the first.
"""

import os
import random
import signal
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
from benchmarks.figures import percentile
from benchmarks.texts import sentences
from tests.process.server import Server
from tests.soak.drain import start
from tests.soak.report import Report, command
from tests.soak.stands import ACCESS, COUNTED, body_of, stand

CLIENTS = 3
ABORTED, BAD, STRANGERS = 0.2, 0.05, 0.05
SAMPLES = 60
WARM_UP = 1 / 3
LONG_MINUTES = 20.0  # a slope over less says nothing about an hour
SHORT_GROWTH_MIB_MAX = 8.0
BAD_BODIES = (b"{", b"[]", b'{"model":"nobody","input":"a"}', b'{"input":[1.5]}', b"\xff\xfe")


@dataclass(frozen=True, slots=True)
class Sample:
    """What the serving process held at an instant."""

    at_s: float
    tasks: int
    threads: int
    files: int
    resident_mib: float


class Life:
    """Clients and what they saw; `over` ends them."""

    def __init__(self, url: str) -> None:
        self.url = f"{url}/v1/embeddings"
        self.over = threading.Event()
        self.latencies: list[tuple[float, float]] = []  # when, seconds; of whole, good requests
        self.wrong: list[str] = []
        self.counts = {"good": 0, "aborted": 0, "bad": 0, "strangers": 0}
        self._texts = sentences(2000, words_median=25, words_max=180)
        self._seeds = iter(range(CLIENTS))

    def live(self) -> None:
        dice = random.Random(next(self._seeds))
        with httpx.Client(headers=ACCESS, timeout=60) as client:
            while not self.over.is_set():
                luck = dice.random()
                if luck < STRANGERS:
                    self._send_a_wrong_key(client, dice)
                elif luck < STRANGERS + BAD:
                    self._send_nonsense(client, dice)
                elif luck < STRANGERS + BAD + ABORTED:
                    self._hang_up(dice)
                else:
                    self._ask(client, dice)

    def _request(self, dice: random.Random) -> bytes:
        return body_of(*dice.sample(self._texts, min(32, round(dice.lognormvariate(0.7, 0.9)) + 1)))

    def _ask(self, client: httpx.Client, dice: random.Random) -> None:
        began_s = time.monotonic()
        status = client.post(self.url, content=self._request(dice)).status_code
        self.latencies.append((began_s, time.monotonic() - began_s))
        self.counts["good"] += 1
        if status != 200:
            self.wrong.append(f"{status} for a good request")

    def _send_nonsense(self, client: httpx.Client, dice: random.Random) -> None:
        answer = client.post(self.url, content=dice.choice(BAD_BODIES))
        self.counts["bad"] += 1
        if answer.status_code not in (400, 404) or "error" not in answer.json():
            self.wrong.append(f"{answer.status_code} for a bad request")

    def _send_a_wrong_key(self, client: httpx.Client, dice: random.Random) -> None:
        wrong = {"Authorization": f"Bearer mistyped-{dice.random()}"}
        answer = client.post(self.url, content=self._request(dice), headers=wrong)
        self.counts["strangers"] += 1
        if answer.status_code != 401:
            self.wrong.append(f"{answer.status_code} for a wrong key")

    def _hang_up(self, dice: random.Random) -> None:
        self.counts["aborted"] += 1
        with suppress(httpx.TimeoutException):
            patience_s = dice.uniform(0.0005, 0.02)
            httpx.post(self.url, content=self._request(dice), headers=ACCESS, timeout=patience_s)


def sample(server: Server, count: int) -> Sample:
    os.kill(server.process.pid, signal.SIGUSR1)
    found = server.wait_until_it_says(COUNTED.pattern, times=count + 1)
    tasks, threads, files, kib = map(int, found.groups())
    return Sample(time.monotonic(), tasks, threads, files, kib / 1024)


def run(minutes: float = 30.0, backend: str = "openvino") -> Report:
    with (
        tempfile.TemporaryDirectory() as folder,
        stand(Path(folder), "--backend", backend) as server,
    ):
        life = Life(server.url)
        threads = start([life.live] * CLIENTS)
        samples = []
        for count in range(SAMPLES):
            time.sleep(minutes * 60 / SAMPLES)
            samples.append(sample(server, count))
        life.over.set()
        for thread in threads:
            thread.join()
        time.sleep(1.0)
        idle = sample(server, SAMPLES)
        return judge(life, samples, idle, minutes)


def judge(life: Life, samples: Sequence[Sample], idle: Sample, minutes: float) -> Report:
    report = Report()
    warm = samples[round(len(samples) * WARM_UP) :]
    hours = np.array([(one.at_s - warm[0].at_s) / 3600 for one in warm])  # [samples]
    resident = np.array([one.resident_mib for one in warm])  # [samples]
    slope = float(np.polyfit(hours, resident, 1)[0])
    thirds = np.array_split(np.array([took_s for _, took_s in life.latencies]), 3)
    first_s, _, last_s = (percentile(third.tolist(), 0.99) for third in thirds)
    report.at_most("answers that were not deserved", len(life.wrong), 0)
    if minutes >= LONG_MINUTES:
        report.at_most("MiB an hour that memory grows after warm-up", slope, 1.0)
        report.at_most("p99 of the last third, to the first", last_s / first_s, 1.1)
    else:
        growth = float(resident[-3:].mean() - resident[:3].mean())
        report.at_most("MiB that memory grew after warm-up", growth, SHORT_GROWTH_MIB_MAX)
    half = len(warm) // 2
    for name in ("files", "threads", "tasks"):
        early = max(getattr(one, name) for one in warm[:half])
        late = max(getattr(one, name) for one in warm[half:])
        report.at_most(f"{name} more in the second half", late - early, CLIENTS)
    report.at_most("tasks with nobody there", idle.tasks, min(one.tasks for one in samples))
    report.figures.update(
        requests=life.counts,
        resident_mib={"warm": round(float(resident[0])), "end": round(float(resident[-1]))},
        slope_mib_per_hour=round(slope, 2),
        p99_ms={"first third": round(first_s * 1e3, 1), "last third": round(last_s * 1e3, 1)},
        idle={"tasks": idle.tasks, "threads": idle.threads, "files": idle.files},
    )
    return report


if __name__ == "__main__":
    command("soak", __doc__, run, minutes=30.0, backend="openvino")
