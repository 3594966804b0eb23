"""The self-test: a changed vector is a problem, a full queue is none, and a cure ends it."""

from typing import cast

import numpy as np
import pytest

from trivec.core.errors import EngineFault, Overloaded, ServiceError
from trivec.core.ports import Embedder, Texts, TextTokenizer
from trivec.core.types import (
    Float32Array,
    LongText,
    ModelCard,
    Output,
    Reply,
    Sequences,
    Vectors,
)
from trivec.server.server import SelfTest

FIRST = np.array([1, 0, 0], np.float32)
NEARLY = np.array([1, 0.001, 0], np.float32)
OTHER = np.array([1, 0.1, 0], np.float32)
BROKEN = np.array([np.nan, 0, 0], np.float32)


class StubEmbedder:
    """An embedder that answers with what it is told to."""

    def __init__(self) -> None:
        self.next: Float32Array | ServiceError = FIRST
        self.asked = 0

    @property
    def card(self) -> ModelCard:
        return ModelCard(
            id="stub",
            token_count_max=8,
            vocabulary_size=8,
            dimensions=3,
            outputs=Output.DENSE,
            precision="fp32",
            created=0,
            owned_by="nobody",
        )

    @property
    def tokenizer(self) -> TextTokenizer:
        return cast("TextTokenizer", self)

    async def tokenize(self, inputs: Texts, *, long_text: LongText) -> Sequences:
        return Sequences.pack([[1]])

    async def embed(
        self,
        sequences: Sequences,
        outputs: Output,
        *,
        timeout_s: float | None = None,
        continues: bool = False,
        background: bool = False,
    ) -> Reply:
        self.asked += 1
        if isinstance(self.next, ServiceError):
            raise self.next
        return Reply(Vectors.of(self.next[np.newaxis], (None,), (None,)), 0.0, 0.0)

    def check_admission(self, token_count: int) -> None:
        raise NotImplementedError


async def after(*answers: Float32Array | ServiceError) -> SelfTest:
    stub = StubEmbedder()
    embedder: Embedder = stub
    self_test = SelfTest([embedder])
    await self_test.start()
    for answer in answers:
        stub.next = answer
        await self_test.check()
    return self_test


@pytest.mark.parametrize(
    ("answers", "has_problem"),
    [
        pytest.param([FIRST], False, id="the-same"),
        pytest.param([NEARLY], False, id="nearly-the-same"),
        pytest.param([OTHER], True, id="another-vector"),
        pytest.param([BROKEN], True, id="not-a-number"),
        pytest.param([EngineFault("broken")], True, id="a-fault"),
        pytest.param(
            [Overloaded("full", retry_after_s=1)], False, id="a-full-queue-proves-nothing"
        ),
        pytest.param([OTHER, Overloaded("full", retry_after_s=1)], True, id="and-cures-nothing"),
        pytest.param([OTHER, FIRST], False, id="cured"),
    ],
)
async def test_what_is_a_problem(
    answers: list[Float32Array | ServiceError], has_problem: bool
) -> None:
    assert bool((await after(*answers)).problems) == has_problem


async def test_a_model_with_an_alias_is_tested_once() -> None:
    stub = StubEmbedder()
    await SelfTest([stub, stub]).start()
    assert stub.asked == 1
