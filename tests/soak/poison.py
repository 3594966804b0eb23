"""Poisoned batches: NaN, exceptions and memory errors at each stage of one item among others.

Run: python -m tests.soak.poison [--batches 200] [--backend fake|openvino]

Requests are gathered behind a closed gate, so that they share batches; one holds a word that breaks
a stage. Only its own request may fail, the others' vectors must be those they have alone.
"""

import asyncio
import base64
import random
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import httpx
import numpy as np
from benchmarks.texts import sentences
from tests.soak.faulty import Fault, Injected
from tests.soak.report import Report, command
from tests.soak.service import MODEL, Service

from trivec.api.responses import encode_embeddings
from trivec.core.ports import Texts, TokenLists
from trivec.core.types import Float32Array, Sequences, Vectors

IN_THE_DEVICE = {
    "poison": Fault.RAISE,
    "memory": Fault.MEMORY,
    "strange": Fault.NAN,
    "broken": Fault.NAN_FOR_GOOD,
    "worse": Fault.EXACT_RAISES,
}
ELSEWHERE = ("tokenizer", "encoding")  # words at which those stages raise
STAGES = (*IN_THE_DEVICE, *ELSEWHERE)
RECOVERED = "strange"  # computed again exactly: nobody notices
REQUESTS = 8


def run(batches: int = 200, backend: str = "fake") -> Report:
    return asyncio.run(_run(batches, backend))


async def _run(batches: int, backend: str) -> Report:
    report = Report()
    dice = random.Random(6)
    texts = sentences(60)
    wrongly, worst_difference, longest_s = [], 0.0, 0.0
    with tempfile.TemporaryDirectory() as folder:
        async with Service(Path(folder), faults=IN_THE_DEVICE, kind=backend) as service:
            with stages_that_raise(service):
                async with service.client() as client:
                    alone = {text: (await ask(client, [text]))[1][0] for text in texts}
                    for count in range(batches):
                        word = STAGES[count % len(STAGES)]
                        inputs = [dice.sample(texts, dice.randint(1, 3)) for _ in range(REQUESTS)]
                        bad = dice.randrange(REQUESTS)
                        inputs[bad].insert(0, f"a {word} text {count}")
                        took_s, answers = await together(service, client, inputs)
                        longest_s = max(longest_s, took_s)
                        for i, (status, vectors) in enumerate(answers):
                            expected = 500 if i == bad and word != RECOVERED else 200
                            if status != expected:
                                wrongly.append((word, i == bad, status))
                            if i != bad:
                                pairs = zip(vectors, inputs[i], strict=True)
                                apart = [np.abs(v - alone[t]).max() for v, t in pairs]
                                worst_difference = max(worst_difference, *apart)
        billed = sum(row.token_count for row in service.store.rows if row.status >= 400)
    report.at_least("batches with one bad item", batches, batches)
    report.at_most("requests with another status than they deserve", len(wrongly), 0)
    report.at_most("difference of a neighbour to its vector alone", worst_difference, 1e-6)
    report.at_most("seconds that anyone waited", longest_s, 1.0)
    report.at_most("tokens billed to failures", billed, 0)
    report.figures["stages"] = list(STAGES)
    return report


@contextmanager
def stages_that_raise(service: Service) -> Iterator[None]:
    """Tokenising and encoding fail for the word that names them."""
    tokenize = service.engine.tokenizer.tokenize
    not_to_encode: list[Sequences] = []

    async def tokenizing(inputs: Texts | TokenLists, **how: Any) -> Sequences:
        if any(isinstance(one, str) and "tokenizer" in one for one in inputs):
            raise Injected
        sequences = await tokenize(inputs, **how)
        if any(isinstance(one, str) and "encoding" in one for one in inputs):
            not_to_encode.append(sequences)
        return sequences

    def encoding(vectors: Vectors, sequences: Sequences, **asked: Any) -> memoryview:
        if any(one is sequences for one in not_to_encode):
            raise Injected
        return encode_embeddings(vectors, sequences, **asked)

    with (
        mock.patch.object(service.engine.tokenizer, "tokenize", tokenizing),
        mock.patch("trivec.api.openai.encode_embeddings", encoding),
    ):
        yield


async def ask(client: httpx.AsyncClient, texts: list[str]) -> tuple[int, list[Float32Array]]:
    """Status and vectors, float32 `[dimensions]` each."""
    body = {"model": MODEL, "input": texts, "encoding_format": "base64"}
    answer = await client.post("/embeddings", json=body)
    if answer.status_code != 200:
        return answer.status_code, []
    rows = answer.json()["data"]
    return 200, [np.frombuffer(base64.b64decode(row["embedding"]), "<f4") for row in rows]


async def together(
    service: Service, client: httpx.AsyncClient, inputs: list[list[str]]
) -> tuple[float, list[tuple[int, list[Float32Array]]]]:
    """Hold the device until all of *inputs* wait; seconds from then on, and the answers."""
    service.faulty.gate.clear()
    service.faulty.entered.clear()
    asking = [asyncio.create_task(ask(client, texts)) for texts in inputs]
    await asyncio.to_thread(service.faulty.entered.wait, 0.5)
    await asyncio.sleep(0.02)  # for the others to get into line; those who do not just come later
    began_s = time.perf_counter()
    service.faulty.gate.set()
    answers = await asyncio.gather(*asking)
    return time.perf_counter() - began_s, list(answers)


if __name__ == "__main__":
    command("poison", __doc__, run, batches=200, backend="fake")
