"""The same text, the same bits: whatever lies beside it, wherever it stands, however busy it is.

Run: python -m benchmarks.invariance [--model ID|DIR] [--name NAME] [--texts FILE] [--rounds 3]

Each text is embedded alone once, then in requests of random size, order and company, several at once.
The largest difference of any number must be 0.0. *FILE* has a text a line, of as many languages as
there are; without it the texts are generated. The last line is JSON.
"""

import argparse
import asyncio
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.figures import Provenance
from benchmarks.harness import engine_on_trial, quiet_settings
from benchmarks.keeping import keep
from benchmarks.texts import SEED, sentences

from trivec.core.ports import Embedder
from trivec.core.types import Float32Array, LongText, Output
from trivec.server.machine import usable_cores

SCRIPTS = (
    "東京は今日も雨です",
    "погода сегодня хорошая",
    "مرحبا بالعالم",
    "สวัสดีชาวโลก",
    "שלום",
    "🙂",
)
AT_ONCE = 8


def texts_of(file: Path | None, count: int) -> list[str]:
    if file is not None:
        lines = [line for line in file.read_text("utf-8").splitlines() if line.strip()]
        return lines[:count]
    longer = sentences(count, words_median=30.0, words_max=180)
    return [
        f"{SCRIPTS[i % len(SCRIPTS)]} {text}" if i % 3 else text for i, text in enumerate(longer)
    ]


def requests(draw: random.Random, count: int) -> Iterator[list[int]]:
    """Every index once, in random order, in requests of 1 to 64."""
    order = draw.sample(range(count), count)
    while order:
        size = draw.choice((1, 2, 3, 8, 17, 64))
        yield order[:size]
        order = order[size:]


async def embed(embedder: Embedder, texts: Sequence[str]) -> Float32Array:
    sequences = await embedder.tokenizer.tokenize(texts, long_text=LongText.CUT_END)
    return (await embedder.embed(sequences, Output.DENSE)).vectors.dense


async def differences(embedder: Embedder, texts: list[str], rounds: int) -> dict[str, Any]:
    """The worst difference beside others, how many texts differ, and what they say alone again.

    Where `alone_again` differs too, not the company but the model's own state is at fault.
    """
    alone = await one_by_one(embedder, texts)
    draw = random.Random(SEED)
    door = asyncio.Semaphore(AT_ONCE)
    worst = np.zeros(len(texts), np.float32)  # [texts]

    async def check(chosen: list[int]) -> None:
        async with door:
            beside = await embed(embedder, [texts[i] for i in chosen])
        worst[chosen] = np.maximum(worst[chosen], np.abs(beside - alone[chosen]).max(axis=1))

    for _ in range(rounds):
        await asyncio.gather(*(check(chosen) for chosen in requests(draw, len(texts))))
    again = np.abs(await one_by_one(embedder, texts) - alone).max(axis=1)  # [texts]
    return {
        "largest": float(worst.max()),
        "differing_texts": int((worst > 0).sum()),
        "alone_again": float(again.max()),
    }


async def one_by_one(embedder: Embedder, texts: list[str]) -> Float32Array:
    return np.concatenate([await embed(embedder, [text]) for text in texts])


async def run(given: argparse.Namespace) -> dict[str, Any]:
    texts = texts_of(given.texts, given.count)
    found = {}
    for precision in given.precisions:
        settings = quiet_settings(given.model, precision=precision, data_dir=given.data_dir)
        async with engine_on_trial(settings, cores=usable_cores()) as trial:
            found[precision] = await differences(trial.embedder, texts, given.rounds)
        print(f"{precision}: {found[precision]}", file=sys.stderr)
    return {
        "benchmark": "invariance",
        "model": given.name,
        "texts": len(texts),
        "rounds": given.rounds,
        "differences": found,
        "provenance": Provenance.now("openvino").as_dict(),
    }


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--model", default="all-minilm-l6-v2")
    arguments.add_argument("--name", default="all-minilm-l6-v2")
    arguments.add_argument("--precisions", nargs="+", default=["int8", "fp32"])
    arguments.add_argument("--texts", type=Path)
    arguments.add_argument("--count", type=int, default=2000)
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--data-dir", type=Path)
    given = arguments.parse_args()
    result = asyncio.run(run(given))
    keep(f"invariance-{given.name}", result)
    sys.exit(any(one["largest"] or one["alone_again"] for one in result["differences"].values()))


if __name__ == "__main__":
    main()
