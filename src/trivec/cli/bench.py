"""`trivec bench`: how fast a model is in this process, or on a running server.

A quick look at the machine at hand; `benchmarks/` of the repository has a leaner load generator, the
peers and the limits of the hardware.
"""

import asyncio
import json
import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from itertools import cycle
from typing import TYPE_CHECKING, Annotated, TypeAlias
from urllib.parse import urlsplit

import typer

from trivec.cli.common import AsJson, DataDir, print_json, print_table, say, settings_of
from trivec.core.errors import StartError

if TYPE_CHECKING:
    from trivec.core.ports import Clock, Observer
    from trivec.settings import Settings

LENGTHS = (16, 128, 512, 2048, 8192)  # tokens a text
REQUEST_TOKENS = {"cpu": 2048, "cuda": 32_768}  # about what the device takes in a batch
SHAPES = ((1, 1), (16, 1), (8, 8), (4, 64))  # clients, texts a request
WAIT_S_MAX = 3600.0  # a measurement brings more work than a server would admit
ANSWER_S_MAX = 120.0
WORDS = [
    "the",
    "of",
    "and",
    "in",
    "city",
    "water",
    "train",
    "school",
    "market",
    "report",
    "science",
    "quickly",
    "infrastructure",
]

Row: TypeAlias = dict[str, str | float]
Measured: TypeAlias = tuple[dict[str, str | int], list[Row]]  # what was measured, and its figures


def bench(
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="ID, DIR or ID=DIR; of a server, an id that it lists."),
    ] = None,
    precision: Annotated[
        str, typer.Option("--precision", help="auto, fp32, int8 or a recipe as int8-rows.")
    ] = "auto",
    url: Annotated[
        str | None,
        typer.Option("--url", help="Measure this server, as http://127.0.0.1:8000/v1."),
    ] = None,
    key: Annotated[
        str | None, typer.Option("--key", help="The server's API key.", envvar="TRIVEC_BENCH_KEY")
    ] = None,
    seconds: Annotated[
        float, typer.Option("--seconds", help="Length of one measurement.", min=0.1)
    ] = 2.0,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Measure how fast a model is, in this process or on a running server.

    In this process: tokens and texts a second, by the length of a text.

    On a server: texts a second and latency, by clients x texts a request.
    """
    if url is not None:
        subject, rows = _measure_server(url.rstrip("/"), key, model, seconds=seconds)
    else:
        waits = {"wait_s_max": WAIT_S_MAX, "first_batch_s_max": WAIT_S_MAX}
        models = (model,) if model else None
        settings = settings_of(data_dir, models=models, precision=precision, queue=waits)
        subject, rows = asyncio.run(_measure_engine(settings, seconds=seconds))
    if as_json:
        print_json({**subject, "rows": rows})
        return
    say(", ".join(f"{name} {value}" for name, value in subject.items()))
    cells = [
        {name: one if isinstance(one, str) else f"{one:,.4g}" for name, one in row.items()}
        for row in rows
    ]
    print_table(cells, numbers=list(cells[0])[1:])


def sentences(count: int) -> list[str]:
    """Texts of about ten words, the same on every run."""
    draw = random.Random(2024)  # noqa: S311 - no secret
    lengths = [max(3, round(draw.lognormvariate(2.3, 0.45))) for _ in range(count)]
    return [" ".join(draw.choices(WORDS, k=length)) for length in lengths]


@dataclass(frozen=True, slots=True)
class BenchContext:
    """What models are built with, where there are no accounts and no HTTP."""

    settings: "Settings"
    clock: "Clock"
    observer: "Observer"


async def _measure_engine(settings: "Settings", *, seconds: float) -> Measured:
    """Rates of the first model of *settings*, behind its own queue and workers."""
    from trivec.build import load_models
    from trivec.core.clock import SystemClock
    from trivec.core.types import LongText, Output, Sequences
    from trivec.server.machine import usable_cores
    from trivec.telemetry import Observers

    context = BenchContext(settings, SystemClock(), Observers())
    models = load_models(settings, context, cores=usable_cores())
    card = models.loaded[0].card
    embedder = models.embedders[card.id]
    in_flight = 2 * models.slot_count + 2  # a free worker always finds the next batch waiting

    async def client(request: Sequences | list[str], ends_s: float) -> list[Sequences]:
        done = []
        while time.perf_counter() < ends_s:
            sequences = request
            if isinstance(sequences, list):
                sequences = await embedder.tokenize(sequences, long_text=LongText.CUT_END)
            await embedder.embed(sequences, Output.DENSE)
            done.append(sequences)
        return done

    requests: dict[str, Sequences | list[str]] = {"sentences": sentences(128)}
    for length in (one for one in LENGTHS if one <= card.token_count_max):
        draw = random.Random(length)  # noqa: S311 - no secret
        count = max(1, REQUEST_TOKENS[models.choice.device] // length)
        ids = [draw.choices(range(5, card.vocabulary_size - 5), k=length) for _ in range(count)]
        requests[f"{length} tokens"] = Sequences.pack(ids)
    rows: list[Row] = []
    models.workers.start()
    try:
        for name, request in requests.items():
            await client(request, time.perf_counter() + 1e-3)  # the first of its shape may compile
            started_s = time.perf_counter()
            clients = [client(request, started_s + seconds) for _ in range(in_flight)]
            done = [one for answered in await asyncio.gather(*clients) for one in answered]
            elapsed_s = time.perf_counter() - started_s  # requests that were sent are waited for
            tokens, texts = sum(one.token_count for one in done), sum(map(len, done))
            rows.append(
                {"text": name, "tokens/s": tokens / elapsed_s, "texts/s": texts / elapsed_s}
            )
    finally:
        await models.workers.stop(within_s=30.0)  # closes the backends, too
    return {"model": card.id, "precision": card.precision, "workers": models.slot_count}, rows


def _measure_server(url: str, key: str | None, model: str | None, *, seconds: float) -> Measured:
    """Rates and latencies of the server at *url*, a thread a client. Raises `StartError`."""
    address = urlsplit(url)
    scheme = HTTPSConnection if address.scheme == "https" else HTTPConnection
    headers = {"Content-Type": "application/json"}
    if key:
        headers["Authorization"] = f"Bearer {key}"

    def ask(connection: HTTPConnection, path: str, body: bytes | None = None) -> bytes:
        try:
            connection.request("POST" if body else "GET", address.path + path, body, headers)
            answer = connection.getresponse()
            answered = answer.read()
        except (OSError, HTTPException) as fault:
            raise StartError(
                f"no server answers at {url} ({fault}); give its base URL with the prefix, as "
                "http://127.0.0.1:8000/v1"
            ) from fault
        if answer.status == HTTPStatus.UNAUTHORIZED:
            raise StartError(f"{url} refuses this key; give another with --key")
        if answer.status != HTTPStatus.OK:
            said = answered[:300].decode(errors="replace")
            raise StartError(f"{url}{path} answered {answer.status}: {said}")
        return answered

    def client(bodies: Iterator[bytes], ends_s: float) -> list[float]:
        """Latencies in seconds; at least one request is sent."""
        connection = scheme(address.hostname or "", address.port, timeout=ANSWER_S_MAX)
        latencies_s: list[float] = []
        with closing(connection):
            while not latencies_s or time.perf_counter() < ends_s:
                sent_s = time.perf_counter()
                ask(connection, "/embeddings", next(bodies))
                latencies_s.append(time.perf_counter() - sent_s)
        return latencies_s

    with closing(scheme(address.hostname or "", address.port, timeout=ANSWER_S_MAX)) as connection:
        try:
            listed = [str(one["id"]) for one in json.loads(ask(connection, "/models"))["data"]]
        except (ValueError, KeyError, TypeError) as fault:
            raise StartError(
                f"{url}/models lists no models; is that a server's base URL?"
            ) from fault
    if not listed or model not in (None, *listed):
        raise StartError(f"{url} serves {', '.join(listed) or 'no model yet'}, and not {model}")
    model = model or listed[0]
    texts = sentences(1024)
    rows: list[Row] = []
    for client_count, text_count in SHAPES:
        parts = [texts[at : at + text_count] for at in range(0, len(texts), text_count)]
        head = {"model": model, "encoding_format": "base64", "truncate": "end"}
        bodies = cycle([json.dumps({**head, "input": part}).encode() for part in parts])
        client(bodies, 0.0)
        cpu_s, started_s = time.process_time(), time.perf_counter()
        with ThreadPoolExecutor(client_count) as threads:
            clients = [
                threads.submit(client, bodies, started_s + seconds) for _ in range(client_count)
            ]
            latencies_s = sorted(one for done in clients for one in done.result())
        elapsed_s = time.perf_counter() - started_s
        rows.append(
            {
                "clients x texts": f"{client_count}x{text_count}",
                "texts/s": len(latencies_s) * text_count / elapsed_s,
                "p50 ms": latencies_s[len(latencies_s) // 2] * 1e3,
                "p99 ms": latencies_s[len(latencies_s) * 99 // 100] * 1e3,
                "client cores": (time.process_time() - cpu_s) / elapsed_s,
            }
        )
    return {"model": model, "url": url}, rows
