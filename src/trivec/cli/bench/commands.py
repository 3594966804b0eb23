"""The two commands: arguments in, a table on stderr, one JSON line on stdout."""

import asyncio
import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trivec.cli.bench.figures import Provenance, Spread, percentile
from trivec.cli.bench.texts import mixed, sentences, uniform

if TYPE_CHECKING:
    from trivec.cli.bench.load import Answers
    from trivec.settings import Settings

MODEL = "all-minilm-l6-v2"
LENGTHS = (16, 128, 512, 2048, 8192)
PACKAGES = ("openvino", "granian", "numpy", "tokenizers")

bench_app = typer.Typer(
    help="Measure the engine alone, or a server over HTTP.", no_args_is_help=True
)

Model = Annotated[str, typer.Option(help="Model to measure: ID, DIR or ID=DIR.")]
Precision = Annotated[str, typer.Option(help="auto, fp32, int8 or a recipe as int8-rows.")]
Seconds = Annotated[float, typer.Option(help="Length of one measurement.", min=0.1)]
Repeats = Annotated[int, typer.Option(help="Times each is measured; medians are shown.", min=1)]
DataDir = Annotated[Path | None, typer.Option(help="Folder for the store and converted models.")]


def report(name: str, figures: Mapping[str, Any]) -> None:
    """Print the one JSON line of a measurement, with where and when it was taken."""
    provenance = Provenance.now(*PACKAGES).as_dict()
    print(json.dumps({"benchmark": name, **figures, "provenance": provenance}))


def talk(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@bench_app.command()
def engine(
    model: Model = MODEL,
    precision: Precision = "auto",
    seconds: Seconds = 2.0,
    repeats: Repeats = 3,
    data_dir: DataDir = None,
) -> None:
    """Texts and tokens a second of the engine alone, by text length."""
    from trivec.cli.bench.engine import quiet_settings

    settings = quiet_settings(model, precision=precision, data_dir=data_dir)
    report("engine", asyncio.run(measure_engine(settings, seconds=seconds, repeats=repeats)))


async def measure_engine(settings: "Settings", *, seconds: float, repeats: int) -> dict[str, Any]:
    """Rates by length, for the first model of *settings*."""
    from trivec.cli.bench.engine import EngineRate, engine_on_trial, sized
    from trivec.server.machine import usable_cores

    cores = usable_cores()
    async with engine_on_trial(settings, cores=cores) as trial:
        card = trial.embedder.card
        first = [uniform(n, tokens=2048) for n in LENGTHS if n <= card.token_count_max]
        first.append(mixed(tokens=4096, length_max=card.token_count_max))
        workloads = [await sized(trial, one, seconds=seconds) for one in first]
        texts = sentences(512)
        taken: dict[str, list[EngineRate]] = {
            name: [] for name in (*(one.name for one in workloads), "sentences")
        }
        for _ in range(repeats):
            for one in workloads:
                taken[one.name].append(await trial.rate_of(one))
            taken["sentences"].append(await trial.rate_of_texts(texts))
    talk(f"{card.id}, {card.precision}, {cores} cores; medians (lowest to highest)")
    lines = {}
    for name, rates in taken.items():
        tokens = Spread.of([rate.tokens_a_second for rate in rates])
        in_texts = Spread.of([rate.texts_a_second for rate in rates])
        talk(f"{name:>10} tokens: {tokens} tokens/s, {in_texts.median:,.5g} texts/s")
        lines[name] = {"tokens_a_second": asdict(tokens), "texts_a_second": asdict(in_texts)}
    return {"model": card.id, "precision": card.precision, "load_s": trial.load_s, "rates": lines}


@bench_app.command()
def server(
    model: Annotated[
        str | None, typer.Option(help="Model to measure; of a running server, the first it lists.")
    ] = None,
    url: Annotated[
        str | None, typer.Option(help="Base URL of a running server; else one is started.")
    ] = None,
    key: Annotated[str | None, typer.Option(help="Its API key.", envvar="TRIVEC_BENCH_KEY")] = None,
    seconds: Seconds = 5.0,
    repeats: Repeats = 3,
    data_dir: DataDir = None,
) -> None:
    """Texts a second and latency over HTTP: 1x1, 16x1, 8x8 and 4x64 (clients x texts)."""
    from trivec.cli.bench.server import SHAPES, Shape, Target, measure, own_server, served_id

    running = (
        nullcontext(Target(url, served_id(url, key, model), key))
        if url
        else own_server(model or MODEL, data_dir=data_dir)
    )
    texts = sentences(1024)
    with running as target:
        for shape in SHAPES:
            measure(target, shape, texts, duration_s=min(1.0, seconds))
        taken: dict[Shape, list[Answers]] = {shape: [] for shape in SHAPES}
        for _ in range(repeats):
            for shape in SHAPES:
                taken[shape].append(measure(target, shape, texts, duration_s=seconds))
    talk(f"{target.model} at {target.base_url}; medians (lowest to highest)")
    lines = {}
    for shape, many in taken.items():
        figures = latency_figures(many, shape.text_count)
        talk(
            f"{shape!s:>6}: {figures['texts_a_second']} texts/s, "
            f"p50 {figures['p50_ms']} ms, p99 {figures['p99_ms']} ms"
        )
        lines[str(shape)] = {name: asdict(spread) for name, spread in figures.items()}
    report("server", {"model": target.model, "shapes": lines})


def latency_figures(many: Sequence["Answers"], text_count: int) -> dict[str, Spread]:
    """Rates and latencies of repeated *many* `Answers` to requests of *text_count* texts."""
    figures = {
        "texts_a_second": Spread.of([one.rate * text_count for one in many]),
        "p50_ms": Spread.of([one.latency_s(0.50) * 1e3 for one in many]),
        "p99_ms": Spread.of([one.latency_s(0.99) * 1e3 for one in many]),
        "client_cpu_share": Spread.of([one.client_cpu_s / one.elapsed_s for one in many]),
    }
    if all(one.compute_s for one in many):
        overheads = [one.latency_s(0.5) - percentile(one.compute_s, 0.5) for one in many]
        figures["p50_beside_compute_ms"] = Spread.of([one * 1e3 for one in overheads])
    return figures
