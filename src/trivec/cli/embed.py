"""`trivec embed`: a corpus to a file of vectors, in this process or by a server."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from typer import Argument, Option

from trivec.cli.common import ConfigFile, DataDir, say, settings_of, shown_progress
from trivec.core.errors import JobFailed, SettingInvalid
from trivec.jobs import GO_ON
from trivec.settings import BULK_LIMITS, Settings

if TYPE_CHECKING:
    from trivec.build import Models
    from trivec.core.types import ModelCard, Output
    from trivec.jobs.embedding import Progress
    from trivec.jobs.encoders import TextEncoder, Truncate
    from trivec.jobs.results import Totals

SHARD_ROWS = 2048  # some dozen batches of a CPU
SHARD_CHARACTERS = 1024 * 1024
MULTI_SHARD_CHARACTERS = 128 * 1024  # a multi-vector takes kilobytes a token
STOP_S_MAX = 5.0
BAD_ROWS_EXIT_CODE, STOPPED_EXIT_CODE = 3, 130

app = typer.Typer(add_completion=False)


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is made of each text."""

    outputs: "Output"
    truncate: "Truncate"
    dimensions: int | None
    prompt: str | None  # its name

    def check(self, card: "ModelCard") -> None:
        """Raise `SettingInvalid` for what the model of *card* does not have."""
        from trivec.jobs.results import check_card

        check_card(card, self.outputs, self.dimensions, self.prompt)


@app.command()
def embed(
    given: Annotated[
        str,
        Argument(metavar="IN", help="JSONL, CSV, Parquet or text file, a folder of these, or -."),
    ],
    out: Annotated[Path, Argument(metavar="OUT", help="A .parquet, .jsonl or .npy file to make.")],
    model: Annotated[
        str | None, Option("--model", "-m", help="ID, DIR or ID=DIR; else MiniLM or the server's.")
    ] = None,
    outputs: Annotated[str, Option(help="dense, sparse, multi, with commas.")] = "dense",
    dtype: Annotated[
        Literal["float32", "float16", "int8", "uint8", "binary", "ubinary"],
        Option(help="What the numbers of dense and multi are, as the API's output_dtype."),
    ] = "float32",
    dimensions: Annotated[
        int | None, Option(help="Numbers of a dense vector, where the model takes fewer.", min=1)
    ] = None,
    prompt: Annotated[
        str | None, Option(help="Name of the model's prompt, as document; else its default one.")
    ] = None,
    text_column: Annotated[str, Option(help="Column of the texts.")] = "text",
    id_column: Annotated[
        str | None, Option(help="Column that identifies a row; else its number does.")
    ] = None,
    keep: Annotated[
        str | None, Option(help="Columns to copy, with commas, '' for none; else all.")
    ] = None,
    form: Annotated[
        Literal["jsonl", "csv", "parquet", "text"] | None,
        Option("--format", help="Of IN, where its name does not say it; jsonl for -."),
    ] = None,
    truncate: Annotated[
        Literal["none", "end", "start"],
        Option(help="Where a text that is too long is cut; none: it gets no vector."),
    ] = "none",
    shard_rows: Annotated[
        int, Option(help="Rows that are kept at a time; raise it on a GPU.", min=1)
    ] = SHARD_ROWS,
    url: Annotated[str | None, Option(help="Server, as http://127.0.0.1:8000/v1.")] = None,
    key: Annotated[str | None, Option(help="Its API key.", envvar="TRIVEC_EMBED_KEY")] = None,
    ray: Annotated[str | None, Option(help="Ray cluster, as auto or HOST:6379.")] = None,
    ray_actors: Annotated[
        int | None, Option(help="Engines on it; else one a GPU, or one a node.", min=1)
    ] = None,
    ray_cpus: Annotated[
        int | None, Option(help="CPUs of each; else 1 beside a GPU, or a node's.", min=1)
    ] = None,
    precision: Annotated[str | None, Option(help="auto, fp32, int8 or an exact recipe.")] = None,
    device: Annotated[str | None, Option(help="auto, cpu or cuda.")] = None,
    backend: Annotated[str | None, Option(help="auto, openvino, torch or fake.")] = None,
    data_dir: DataDir = None,
    config: ConfigFile = None,
) -> None:
    """Embed a corpus: from files of texts to a file of vectors.

    After Ctrl-C, a fault or a death, the same command goes on where it was.

    Exit codes: 0 every row has a vector; 3 those in OUT.errors.jsonl have none; 2 refused, or
    failed; 130 stopped.
    """
    try:
        import pyarrow as pa

        from trivec.jobs.corpus import Columns, Corpus, ShardSize, check_columns, find_sources
        from trivec.jobs.embedding import embed_corpus
        from trivec.jobs.results import ENDINGS, RESERVED, Layout, Results, parse_outputs
    except ImportError as fault:
        if fault.name != "pyarrow":
            raise
        raise JobFailed("trivec embed needs pyarrow: pip install 'trivec[bulk]'") from fault
    from trivec.core.types import Output

    # Arrow's own pool keeps some 60 MB of what is freed; malloc, nearly nothing.
    pa.set_memory_pool(pa.system_memory_pool())
    wanted = Wanted(parse_outputs(outputs), truncate, dimensions, prompt)
    if out.suffix not in ENDINGS:
        raise JobFailed(f"{out} ends in none of {', '.join(ENDINGS)}, which say what to make")
    if out.suffix == ".npy" and wanted.outputs != Output.DENSE:
        raise JobFailed("an .npy file holds dense vectors alone; make a .parquet file")
    kept = None if keep is None else tuple(filter(None, keep.split(",")))
    columns = Columns(text_column, id_column, kept, reserved=RESERVED)
    is_multi = Output.MULTI in wanted.outputs
    size = ShardSize(shard_rows, MULTI_SHARD_CHARACTERS if is_multi else SHARD_CHARACTERS)
    sources = find_sources(given, form=form, out=out)
    check_columns(sources, columns)

    flags = {"precision": precision, "device": device, "backend": backend}
    if ray is not None and url is not None:
        raise JobFailed("--ray and --url both say what computes; give one")
    if url is not None:
        if any(flags.values()):
            raise JobFailed("--precision, --device and --backend are the server's with --url")
        opened = _on_server(url, key, model, wanted)
    else:
        models = (model,) if model else None
        settings = settings_of(data_dir, config, models=models, **BULK_LIMITS, **flags)
        if len(settings.models) > 1:
            raise SettingInvalid(f"models is {', '.join(settings.models)}; choose one with --model")
        if ray is not None:
            opened = _on_ray(ray, settings, wanted, actors=ray_actors, cpus=ray_cpus)
        else:
            opened = _in_process(_load(settings, wanted), wanted)

    async def run() -> "Totals | None":
        async with opened as encoder:
            width = encoder.model["dimensions"]
            assert isinstance(width, int), "the model says how long its vectors are"
            if dtype in ("binary", "ubinary") and (count := dimensions or width) % 8:
                raise JobFailed(
                    f"--dtype {dtype} packs eight numbers in a byte; {count} is no multiple"
                )
            identity = {
                "model": dict(encoder.model),
                "outputs": sorted(set(outputs.split(","))),
                "dimensions": dimensions,
                "dtype": dtype,
                "prompt": prompt,
                "truncate": truncate,
                "columns": [text_column, id_column, keep],
                "shard": asdict(size),
            }
            cuts = truncate != "none"
            layout = Layout(wanted.outputs, width, dimensions, dtype, marks_truncated=cuts)
            results, corpus = Results(out, identity, layout), Corpus(sources, columns, size)
            with results.open(), _stop_signals() as stop, _shown() as on_progress:
                return await embed_corpus(
                    corpus, results, encoder, stop=stop, on_progress=on_progress
                )

    totals = asyncio.run(run())
    if totals is None:
        say(f"Stopped. {GO_ON}.")
        raise typer.Exit(STOPPED_EXIT_CODE)
    cut = f", {totals.truncated:,} of them cut" if totals.truncated else ""
    say(f"{out}: {totals.texts:,} texts{cut}, {totals.tokens:,} tokens")
    if totals.bad:
        rows = "row has" if totals.bad == 1 else "rows have"
        say(f"{totals.bad:,} {rows} no vector; {out}.errors.jsonl says why")
        raise typer.Exit(BAD_ROWS_EXIT_CODE)


def _load(settings: Settings, wanted: Wanted) -> "Models":
    """The model of *settings*. Raises `StartError`."""
    from trivec.build import load_models, open_parts
    from trivec.server.machine import usable_cores
    from trivec.telemetry import configure_log

    configure_log(settings.telemetry.log_format, level="warning")
    with shown_progress() as on_progress:
        parts = open_parts(settings)
        models = load_models(settings, parts, cores=usable_cores(), on_progress=on_progress)
    card = models.cards[0]
    say(f"{card.id} in {card.precision} on {models.choice.device} ({models.choice.backend})")
    wanted.check(card)
    return models


@asynccontextmanager
async def _in_process(models: "Models", wanted: Wanted) -> AsyncIterator["TextEncoder"]:
    """The first of *models* with its workers, until the block ends."""
    from trivec.build import text_encoder
    from trivec.telemetry import finish_log

    encoder = text_encoder(
        models, wanted.outputs, truncate=wanted.truncate, prompt_name=wanted.prompt
    )
    models.workers.start()
    watch = asyncio.create_task(models.workers.lost())  # fails the requests when workers are lost
    try:
        yield encoder
    finally:
        watch.cancel()
        await models.workers.stop(within_s=STOP_S_MAX)  # closes the backends, too
        finish_log()


@asynccontextmanager
async def _on_ray(
    address: str, settings: Settings, wanted: Wanted, *, actors: int | None, cpus: int | None
) -> AsyncIterator["TextEncoder"]:
    """Actors on the Ray cluster at *address*. Raises `JobFailed`, `StartError`."""
    try:
        from trivec.cluster.data import BulkWork, ray_encoder, without_secrets
    except ImportError as fault:
        if fault.name != "ray":
            raise
        raise JobFailed("--ray needs Ray: pip install 'trivec[cluster]'") from fault

    work = BulkWork(without_secrets(settings), wanted.outputs, wanted.truncate, wanted.prompt)
    async with ray_encoder(address, work, actors=actors, cpus=cpus) as encoder:
        card = encoder.card
        wanted.check(card)
        say(f"{card.id} in {card.precision} on {len(encoder.actors)} actors of {address}")
        yield encoder


@asynccontextmanager
async def _on_server(
    url: str, key: str | None, model: str | None, wanted: Wanted
) -> AsyncIterator["TextEncoder"]:
    """The server at *url*. Raises `JobFailed` where it does not answer."""
    from trivec.jobs.encoders import HttpEncoder

    fields = {"dimensions": wanted.dimensions, "prompt_name": wanted.prompt}
    asks = {name: value for name, value in fields.items() if value is not None}
    encoder = HttpEncoder(
        url, key, model=model, outputs=wanted.outputs, truncate=wanted.truncate, asks=asks
    )
    try:
        yield encoder
    finally:
        await asyncio.to_thread(encoder.close)


@contextmanager
def _stop_signals() -> Iterator[asyncio.Event]:
    """An event that the first Ctrl-C or SIGTERM sets; the second one ends the process."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()

    def ask_to_stop() -> None:
        if stop.is_set():  # nothing needs a clean-up, and a read may never return
            say(f"Left. {GO_ON}.")
            os._exit(STOPPED_EXIT_CODE)
        stop.set()
        say("Finishing the shards that are begun; once more leaves them.")

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, ask_to_stop)
    try:
        yield stop
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


@contextmanager
def _shown() -> "Iterator[Callable[[Progress], None]]":
    """Shows progress, from the first shard on."""
    started_s, start_position = time.monotonic(), 0.0

    def show(progress: "Progress") -> None:
        nonlocal start_position
        if progress.rows == 0:  # earlier runs did it
            start_position = progress.position or 0.0
        elapsed_s = time.monotonic() - started_s
        on_progress(status(progress, elapsed_s, start_position=start_position), progress.position)

    with shown_progress(first_line_s=0.0) as on_progress:
        yield show


def status(progress: "Progress", elapsed_s: float, *, start_position: float) -> str:
    """How far it is, how fast, and the time left, in a line.

    *start_position*: share of the input that earlier runs had done.
    """
    parts = [f"{progress.rows_kept + progress.rows:,} rows"]
    if progress.rows_kept:
        parts[0] += f" ({progress.rows_kept:,} of earlier runs)"
    if progress.rows:
        parts.append(f"{progress.texts / elapsed_s:,.0f} texts/s")
        parts.append(f"{progress.tokens / elapsed_s:,.0f} tokens/s")
    if progress.bad:
        parts.append(f"{progress.bad:,} without a vector")
    if progress.position is not None and progress.position > start_position:
        done = progress.position - start_position
        left_s = elapsed_s * (1 - progress.position) / done
        parts.append(f"{timedelta(seconds=round(left_s))} left")
    return ", ".join(parts)
