"""The server's rates and latencies over HTTP, beside its own engine's in the same run.

Run: python -m benchmarks.server [--model ID|DIR] [--name NAME] [--data-dir DIR]

The server and the bare engine are both loaded and take turns. Shapes are clients x texts. For the
lone client, the engine time is what the answer's `server-timing` calls compute. The last line is JSON.
"""

import argparse
import asyncio
import sys
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.figures import Provenance, ratio
from benchmarks.harness import (
    SHAPES,
    EngineOnTrial,
    Shape,
    Target,
    engine_on_trial,
    latency_figures,
    measure,
    own_server,
    quiet_settings,
)
from benchmarks.keeping import keep
from benchmarks.load import Answers
from benchmarks.texts import sentences

from trivec.server.machine import usable_cores


async def measure_beside_engine(
    target: Target, trial: EngineOnTrial, *, seconds: float, repeats: int
) -> dict[str, Any]:
    """Every shape and the engine's own rate on the same texts, round by round."""
    texts = sentences(1024)
    for shape in SHAPES:
        await asyncio.to_thread(measure, target, shape, texts, duration_s=min(1.0, seconds))
    engine_texts = texts * max(1, round(seconds * (await rate(trial, texts)) / len(texts)))
    answers: dict[Shape, list[Answers]] = defaultdict(list)
    engine: list[float] = []
    for _ in range(repeats):
        engine.append(await rate(trial, engine_texts))
        for shape in SHAPES:
            taken = await asyncio.to_thread(measure, target, shape, texts, duration_s=seconds)
            answers[shape].append(taken)
    figures = {}
    for shape, many in answers.items():
        spreads = latency_figures(many, shape.text_count)
        over_http = [one.rate * shape.text_count for one in many]
        spreads["share_of_engine"] = ratio(over_http, engine)
        print(
            f"{shape!s:>6}: {spreads['texts_a_second']} texts/s, "
            f"{spreads['share_of_engine'].median:.2f} of the engine's, "
            f"p50 {spreads['p50_ms'].median} ms, p99 {spreads['p99_ms'].median} ms",
            file=sys.stderr,
        )
        figures[str(shape)] = {name: asdict(spread) for name, spread in spreads.items()}
    return figures


async def rate(trial: EngineOnTrial, texts: list[str]) -> float:
    return (await trial.rate_of_texts(texts)).texts_a_second


async def run(given: argparse.Namespace) -> dict[str, Any]:
    settings = quiet_settings(given.model, precision=given.precision, data_dir=given.data_dir)
    arguments = ["--precision", given.precision]
    with own_server(given.model, data_dir=given.data_dir, arguments=arguments) as target:
        async with engine_on_trial(settings, cores=usable_cores()) as trial:
            shapes = await measure_beside_engine(
                target, trial, seconds=given.seconds, repeats=given.repeats
            )
            precision = trial.embedder.card.precision
    return {
        "benchmark": "server",
        "model": given.name,
        "precision": precision,
        "shapes": shapes,
        "provenance": Provenance.now("openvino", "granian", "starlette").as_dict(),
    }


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--model", default="all-minilm-l6-v2")
    arguments.add_argument("--name", default="all-minilm-l6-v2")
    arguments.add_argument("--precision", default="int8", choices=["int8", "fp32"])
    arguments.add_argument("--data-dir", type=Path)
    arguments.add_argument("--seconds", type=float, default=3.0)
    arguments.add_argument("--repeats", type=int, default=3)
    given = arguments.parse_args()
    keep(f"server-{given.name}-{given.precision}", asyncio.run(run(given)))


if __name__ == "__main__":
    main()
