"""`trivec bench`: how fast a model is in this process, or on a running server.

A quick look; `benchmarks/` has a leaner load generator, the peers and the limits of the hardware.
"""

import asyncio
import json
import random
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from itertools import cycle
from typing import TYPE_CHECKING, Annotated, TypeAlias
from urllib.parse import urlsplit

import typer
from typer import Option

from trivec.cli.common import (
    AsJson,
    DataDir,
    Row,
    print_json,
    print_table,
    say,
    settings_of,
    shown_progress,
)
from trivec.core.errors import StartError
from trivec.settings import Settings

if TYPE_CHECKING:
    from trivec.core.ports import OnProgress

LENGTHS = (16, 128, 512, 2048, 8192)  # tokens a text
REQUEST_TOKENS = {"cpu": 2048, "cuda": 32_768}  # about what such a device takes in a batch
SHAPES = ((1, 1), (16, 1), (8, 8), (4, 64))  # clients, texts a request
CHART_COLUMNS = 40
WAIT_S_MAX = 3600.0  # a measurement brings more work than a server would admit
ANSWER_S_MAX = 120.0
WORDS = "the water of the city and the trains of its market reported in science and in most schools"

Measured: TypeAlias = tuple[dict[str, str | int], list[Row]]  # what was measured, and its figures

app = typer.Typer(add_completion=False)


@app.command()
def bench(
    model: Annotated[str | None, Option("--model", "-m", help="ID, DIR or ID=DIR.")] = None,
    precision: Annotated[str, Option(help="auto, fp32, int8 or a recipe as int8-rows.")] = "auto",
    url: Annotated[str | None, Option(help="Server, as http://127.0.0.1:8000/v1.")] = None,
    key: Annotated[str | None, Option(help="Its API key.", envvar="TRIVEC_BENCH_KEY")] = None,
    seconds: Annotated[float, Option(help="Length of one measurement.", min=0.1)] = 2.0,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Measure how fast a model is, in this process or, with --url, on a running server.

    In this process: tokens and texts a second, by the length of a text.

    On a server: texts a second and latency, by clients x texts a request.
    """
    with shown_progress() as on_progress:
        if url is not None:
            subject, rows = _measure_server(url.rstrip("/"), key, model, seconds, on_progress)
        else:
            waits = {"wait_s_max": WAIT_S_MAX, "first_batch_s_max": WAIT_S_MAX}
            models = (model,) if model else None
            settings = settings_of(data_dir, models=models, precision=precision, queue=waits)
            subject, rows = asyncio.run(_measure_engine(settings, seconds, on_progress))
    if as_json:
        print_json({**subject, "rows": rows})
    else:
        say(", ".join(f"{name} {value}" for name, value in subject.items()))
        print_table(rows)
        if sys.stdout.isatty():
            _print_chart(rows)


def _print_chart(rows: list[Row]) -> None:
    """A bar a row, as long as its first rate is of the largest: a share, which no bar rounds down."""
    from rich.console import Console
    from rich.progress_bar import ProgressBar
    from rich.table import Table

    [label, rate] = list(rows[0])[:2]
    rates = [figure for row in rows if isinstance(figure := row[rate], float)]
    chart, top = Table(box=None, header_style="bold", pad_edge=False), max(rates)
    chart.add_column(label, no_wrap=True)
    chart.add_column(rate, ratio=1)
    for row, figure in zip(rows, rates, strict=True):
        bar = ProgressBar(1.0, figure / top, width=CHART_COLUMNS, finished_style="bar.complete")
        chart.add_row(str(row[label]), bar)
    Console().print(chart)


async def _measure_engine(
    settings: Settings, seconds: float, on_progress: "OnProgress"
) -> Measured:
    """Rates of the first model of *settings*, behind its own queue and workers."""
    from trivec.build import load_models, open_parts
    from trivec.core.types import Sequences
    from trivec.server.machine import usable_cores

    parts = open_parts(settings)
    models = load_models(
        settings, parts, cores=usable_cores(), takes_text=False, on_progress=on_progress
    )
    card = models.cards[0]
    embedder = models.embedders[card.id]
    request_tokens = REQUEST_TOKENS[models.choice.device]
    in_flight = 2 * models.slot_count + 2  # a free worker always finds the next batch waiting

    async def client(request: Sequences, ends_s: float) -> int:
        """Requests that were answered; one that was sent is waited for."""
        count = 0
        while not count or time.perf_counter() < ends_s:
            await embedder.embed(request, card.main_output)
            count += 1
        return count

    rows: list[Row] = []
    models.workers.start()
    try:
        lengths = [one for one in LENGTHS if one <= card.token_count_max]
        for done, length in enumerate(lengths):
            on_progress(f"measuring texts of {length} tokens", done / len(lengths))
            draw = random.Random(length)  # noqa: S311 - no secret
            text_count = max(1, request_tokens // length)
            ids = draw.choices(range(5, card.vocabulary_size - 5), k=length * text_count)
            request = Sequences.pack([ids[n * length :][:length] for n in range(text_count)])
            await client(request, 0.0)  # the first of its shape may compile
            started_s = time.perf_counter()
            clients = [client(request, started_s + seconds) for _ in range(in_flight)]
            requests_per_s = sum(await asyncio.gather(*clients)) / (time.perf_counter() - started_s)
            rows.append(
                {
                    "text": f"{length} tokens",
                    "tokens/s": request.token_count * requests_per_s,
                    "texts/s": text_count * requests_per_s,
                }
            )
    finally:
        await models.workers.stop(within_s=30.0)  # closes the backends, too
    return {"model": card.id, "precision": card.precision, "workers": models.slot_count}, rows


def _measure_server(
    url: str, key: str | None, model: str | None, seconds: float, on_progress: "OnProgress"
) -> Measured:
    """Rates and latencies of the server at *url*, a thread a client. Raises `StartError`."""
    address = urlsplit(url)
    headers = {"Content-Type": "application/json"}
    headers |= {"Authorization": f"Bearer {key}"} if key else {}
    scheme = HTTPSConnection if address.scheme == "https" else HTTPConnection
    try:
        connect = partial(scheme, address.hostname or "", address.port, timeout=ANSWER_S_MAX)
    except ValueError as fault:
        raise StartError(f"--url {url} is no address: {fault}") from fault

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
        """Seconds that each answer took; a request that was sent is waited for."""
        latencies_s: list[float] = []
        with closing(connect()) as connection:
            while not latencies_s or time.perf_counter() < ends_s:
                sent_s = time.perf_counter()
                ask(connection, "/embeddings", next(bodies))
                latencies_s.append(time.perf_counter() - sent_s)
        return latencies_s

    with closing(connect()) as connection:
        answer = ask(connection, "/models")
    try:
        served = [str(one["id"]) for one in json.loads(answer)["data"]]
    except (ValueError, KeyError, TypeError) as fault:
        raise StartError(f"{url}/models is no list of models; give a base URL") from fault
    if not served or model not in (None, *served):
        raise StartError(f"{url} serves {', '.join(served) or 'no model yet'}, and not {model}")
    head = {"model": model or served[0], "encoding_format": "base64", "truncate": "end"}
    texts = [f"{n} {WORDS[: 30 + n * 7 % 60]}" for n in range(1024)]  # of 5 to 17 words
    rows: list[Row] = []
    for done, (client_count, text_count) in enumerate(SHAPES):
        step = f"measuring {client_count} clients with {text_count} texts a request"
        on_progress(step, done / len(SHAPES))
        parts = [texts[at : at + text_count] for at in range(0, len(texts), text_count)]
        bodies = cycle([json.dumps({**head, "input": part}).encode() for part in parts])
        client(bodies, 0.0)
        cpu_s, started_s = time.process_time(), time.perf_counter()
        with ThreadPoolExecutor(client_count) as threads:
            ends_s = [started_s + seconds] * client_count
            taken = threads.map(client, [bodies] * client_count, ends_s)
            latencies_s = sorted(latency_s for one in taken for latency_s in one)
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
    return {"model": model or served[0], "url": url}, rows
