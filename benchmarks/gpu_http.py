"""The torch engine end to end over HTTP, at several client counts, by as many processes of clients
as it takes to keep the server busy.
"""

import argparse
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.figures import percentile
from benchmarks.gpu_plan import Plan, talk
from benchmarks.harness import ServerFailed, Shape, Target, measure, own_server
from benchmarks.load import Answers, LoadFailed
from benchmarks.texts import sentences

LOADERS_MAX = 6  # one process of clients ends near 10,000 answers a second
WORDS = {"short": 10.0, "long": 350.0}  # a text; by XLM-R's tokeniser some 17 and 420 tokens
TEXTS = {"short": 4096, "long": 512}


@dataclass(frozen=True, slots=True)
class Run:
    """One load to put on the server."""

    kind: str  # of the texts
    shape: Shape

    def __str__(self) -> str:
        return f"{self.kind} {self.shape}"


SMALL = (Run("short", Shape(1, 1)), Run("short", Shape(4, 1)), Run("short", Shape(8, 8)))
FULL = (
    *(Run("short", Shape(*pair)) for pair in ((1, 1), (16, 1), (64, 1), (256, 1))),
    *(Run("short", Shape(*pair)) for pair in ((64, 8), (32, 32), (16, 128))),
    Run("long", Shape(1, 1)),
    Run("long", Shape(32, 16)),
)


def over_http(
    folder: Path,
    arguments: argparse.Namespace,
    plan: Plan,
    *,
    keep: Callable[[dict[str, Any]], None],
) -> dict[str, Any] | str:
    """Texts a second and latency of `trivec serve`, by clients and texts a request.

    *keep* hears of every run. One that fails loses only itself, as long as the server lives.
    """
    cores = os.cpu_count() or 1
    api_processes = arguments.api_processes or (2 if arguments.small else max(1, cores // 2))
    options = ["--backend", "torch"]
    options += ["--device", arguments.device, "--precision", arguments.precision]
    found: dict[str, Any] = {"api_processes": api_processes}
    loader_count = max(1, min(LOADERS_MAX, cores // 4))
    try:
        with (
            settings_of_server(api_processes),
            own_server(str(folder), arguments=options) as target,
            ProcessPoolExecutor(loader_count, mp_context=get_context("spawn")) as loaders,
        ):
            for run in SMALL if arguments.small else FULL:
                load = partial(answers_to, run, target, loaders=loaders, loader_count=loader_count)
                try:
                    load(seconds=min(1.0, plan.seconds))
                    found[str(run)] = figures_of(load(seconds=plan.seconds), run.shape.text_count)
                except (LoadFailed, OSError) as error:
                    found[str(run)] = f"failed: {error}"
                talk(f"{run!s:>14}: {found[str(run)]}")
                keep(found)
    except ServerFailed as error:
        talk(str(error))
        return f"the server did not start: {str(error).splitlines()[0]}"
    return found


@contextmanager
def settings_of_server(api_processes: int) -> Iterator[None]:
    """What the server is told by the environment. It need not wait for clients when it is stopped."""
    told = {"TRIVEC_API_PROCESSES": str(api_processes), "TRIVEC_LIFE__DRAIN_GRACE_S": "0"}
    os.environ.update(told)
    try:
        yield
    finally:
        for name in told:
            del os.environ[name]


def answers_to(
    run: Run, target: Target, *, loaders: ProcessPoolExecutor, loader_count: int, seconds: float
) -> list[Answers]:
    """The run's clients, shared out among processes."""
    clients = run.shape.client_count
    counts = [clients // loader_count + (i < clients % loader_count) for i in range(loader_count)]
    put = partial(load_from_one_process, run, target, seconds)
    return list(loaders.map(put, [count for count in counts if count]))


def load_from_one_process(run: Run, target: Target, seconds: float, client_count: int) -> Answers:
    texts = sentences(TEXTS[run.kind], words_median=WORDS[run.kind], words_max=500)
    shape = Shape(client_count, run.shape.text_count)
    return measure(target, shape, texts, duration_s=seconds)


def figures_of(parts: Sequence[Answers], text_count: int) -> dict[str, float]:
    latencies = [latency for part in parts for latency in part.latencies_s]
    return {
        "texts_a_second": sum(part.rate for part in parts) * text_count,
        "p50_ms": percentile(latencies, 0.50) * 1e3,
        "p99_ms": percentile(latencies, 0.99) * 1e3,
    }
