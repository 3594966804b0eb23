"""An exception in every stage of a worker's life: everyone is answered, the thread is replaced.

Run: python -m benchmarks.soak.workers [--times 20]

Each stage raises once while requests wait, and everything else goes on as it was. Nobody may wait
for an answer that does not come, at most the batch at hand may fail, and the next request is served.
"""

import asyncio
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.soak.faulty import Injected, Killed
from benchmarks.soak.poison import ask, together
from benchmarks.soak.report import Report, command
from benchmarks.soak.service import Service
from benchmarks.texts import sentences

from trivec.engine import desk, lane, pace, runner
from trivec.engine.heartbeat import Calls

REQUESTS = 6
SLOT = "trivec-slot"  # how the name of a worker's thread begins
ANSWER_S_MAX = 1.0
FAILED_S = 5.0  # how long a form waits for what does not come


@dataclass(frozen=True, slots=True)
class Stage:
    """A function that a worker's thread calls, broken before or after it has done its work."""

    name: str
    owner: Any
    attribute: str
    after: bool = False
    error: type[BaseException] = Injected


def stages(service: Service) -> list[Stage]:
    return [
        Stage("waits for work", desk, "next_lane"),
        Stage("chooses a batch", lane, "take_batch"),
        Stage("has taken it out of the line", lane, "take_batch", after=True),
        Stage("reckons its time", pace.Pace, "usual_s"),
        Stage("packs it", runner, "pack"),
        Stage("begins the call", Calls, "began"),
        Stage("computes", service.faulty, "run"),
        Stage("is killed computing", service.faulty, "run", error=Killed),
        Stage("ends the call", Calls, "ended"),
        Stage("looks for NaN", runner, "unsound_rows"),
        Stage("cuts it in parts", runner, "slice_rows"),
        Stage("tells observers", service.ears, "observe"),
        Stage("settles", lane.Lane, "settle"),
        Stage("has settled", lane.Lane, "settle", after=True),
        Stage("answers", desk, "_send"),
    ]


@contextmanager
def raising_once(stage: Stage) -> Iterator[Callable[[], bool]]:
    """The stage raises the first time that a worker comes to it; gives whether it has."""
    whole = getattr(stage.owner, stage.attribute)
    has_raised = threading.Event()

    def broken(*arguments: Any, **options: Any) -> Any:
        is_worker = threading.current_thread().name.startswith(SLOT)
        if not is_worker or has_raised.is_set():
            return whole(*arguments, **options)
        has_raised.set()
        if stage.after:
            whole(*arguments, **options)
        raise stage.error

    with mock.patch.object(stage.owner, stage.attribute, broken):
        yield has_raised.is_set


def slot_threads() -> int:
    return sum(thread.name.startswith(SLOT) for thread in threading.enumerate())


def run(times: int = 20) -> Report:
    with mock.patch("threading.excepthook"):
        return asyncio.run(_run(times))


async def _run(times: int) -> Report:
    report = Report()
    texts = sentences(REQUESTS)
    longest: dict[str, float] = {}
    failed: dict[str, int] = {}
    unanswered: list[str] = []
    unbroken: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        async with Service(Path(folder)) as service, service.client() as client:
            await ask(client, texts)
            threads = slot_threads()
            for stage in stages(service):
                for _ in range(times):
                    with raising_once(stage) as has_raised:
                        asked = [[text] for text in texts]
                        began_s = time.perf_counter()
                        try:
                            async with asyncio.timeout(FAILED_S):
                                _, answers = await together(service, client, asked)
                                after, _ = await ask(client, texts[:1])
                        except TimeoutError:
                            unanswered.append(stage.name)
                            break
                        took_s = time.perf_counter() - began_s
                    if not has_raised():
                        unbroken.append(stage.name)
                    longest[stage.name] = max(took_s, longest.get(stage.name, 0))
                    statuses = [status for status, _ in answers]
                    failed[stage.name] = failed.get(stage.name, 0) + statuses.count(500)
                    if after != 200 or not {*statuses} <= {200, 500}:
                        unanswered.append(f"{stage.name}: {after} after {statuses}")
            left = slot_threads() - threads
            replaced = service.ears.counts.get("WorkerRestarted", 0)
    report.at_most("stages that were never reached", len(unbroken), 0)
    report.at_most("times that somebody was not answered", len(unanswered), 0)
    report.at_most("seconds until all were, at worst", max(longest.values()), ANSWER_S_MAX)
    report.at_most("threads too many at the end", left, 0)
    report.figures.update(
        stages=[stage.name for stage in stages(service)],
        threads_replaced=replaced,
        requests_failed=failed,
        unanswered=unanswered,
    )
    return report


if __name__ == "__main__":
    command("workers", __doc__, run, times=20)
