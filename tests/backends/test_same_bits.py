"""A text's vectors do not depend on what else is in the batch, on its place, or on the load.

Decision 0002, and target 7 of the engine: difference 0.0, at fp32 and in each int8 form.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from tests.backends.batches import ALL, batch_of, bits
from tests.backends.conftest import SkipUnlessRun, random_ids

from trivec.backends.openvino.certifying import Trial, fp32_tensors, readout_of
from trivec.backends.openvino.encoding import BatchEncoder
from trivec.backends.openvino.graph import build_graph
from trivec.backends.openvino.recipe import (
    FP32,
    INT8_GROUPS_32,
    INT8_GROUPS_128,
    INT8_ROWS,
    INT8_ROWS_BF16,
    Recipe,
)
from trivec.backends.openvino.session import Session
from trivec.checkpoints.checkpoint import Checkpoint
from trivec.core.types import Output

LENGTHS = [1, 2, 3, 5, 8, 13, 16, 17, 31, 33, 64, 65, 100, 128, 129, 200, 256, 300, 511, 512, 650]


RECIPES = [FP32, INT8_ROWS_BF16, INT8_ROWS, INT8_GROUPS_128, INT8_GROUPS_32]


@pytest.fixture(scope="module", params=RECIPES, ids=lambda recipe: recipe.name)
def encoder(
    request: pytest.FixtureRequest, tiny_m3: Checkpoint, skip_unless_run: SkipUnlessRun
) -> BatchEncoder:
    recipe: Recipe = request.param
    skip_unless_run(recipe)
    exact = recipe is FP32
    tensors = fp32_tensors(tiny_m3) if exact else Trial(tiny_m3, slot_count=2).tensors(recipe)
    session = Session(build_graph(tiny_m3.config, tensors, recipe), recipe, slot_count=2)
    return BatchEncoder(
        session, readout_of(tiny_m3), position_offset=tiny_m3.config.position_offset
    )


def alone(encoder: BatchEncoder, texts: list[list[int]]) -> list[tuple[bytes, ...]]:
    return [bits(encoder.run(batch_of([ids], ALL), slot=0), 0) for ids in texts]


def test_alone_first_last_and_among_strangers_are_the_same_bits(encoder: BatchEncoder) -> None:
    texts = random_ids(LENGTHS)
    expected = alone(encoder, texts)
    draw = np.random.default_rng(1)
    for _ in range(8):
        order = draw.permutation(len(texts))[: draw.integers(2, len(texts) + 1)]
        found = encoder.run(batch_of([texts[i] for i in order], ALL), slot=0)
        assert [bits(found, place) for place in range(len(order))] == [expected[i] for i in order]


def test_both_slots_at_once_give_the_same_bits(encoder: BatchEncoder) -> None:
    texts = random_ids(LENGTHS, seed=5)
    expected = alone(encoder, texts)
    batches = [batch_of(texts[slot::2] * 3, ALL) for slot in range(2)]
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda slot: encoder.run(batches[slot], slot=slot), range(2)))
    for slot, found in enumerate(both):
        assert [bits(found, i) for i in range(len(found))] == expected[slot::2] * 3


def test_what_others_ask_for_does_not_change_a_vector(encoder: BatchEncoder) -> None:
    """With CLS pooling the last layer skips tokens nobody asked for; the bits must not notice."""
    texts = random_ids([20, 30, 25])
    plain = encoder.run(batch_of(texts, Output.DENSE), slot=0)
    mixed = encoder.run(batch_of(texts, [Output.DENSE, ALL, Output.DENSE]), slot=0)
    assert plain.dense.tobytes() == mixed.dense.tobytes()
    assert [one is None for one in mixed.sparse] == [True, False, True]
    assert [one is None for one in mixed.multi] == [True, False, True]


def test_memory_given_back_after_each_row_does_not_change_the_bits(
    encoder: BatchEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = random_ids([650, 20, 300, 5, 700])
    expected = alone(encoder, texts)
    monkeypatch.setattr("trivec.backends.openvino.session.LONG_TOKENS", 0)
    assert alone(encoder, texts) == expected
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda s: encoder.run(batch_of(texts, ALL), slot=s), range(2)))
    for found in both:
        assert [bits(found, i) for i in range(len(texts))] == expected


def test_a_batch_of_2048_texts_keeps_order_and_bits(encoder: BatchEncoder) -> None:
    draw = np.random.default_rng(2)
    texts = random_ids(draw.integers(1, 40, 2048).tolist())
    found = encoder.run(batch_of(texts), slot=0)
    for i in draw.choice(2048, 60, replace=False).tolist():
        assert found.dense[i].tobytes() == encoder.run(batch_of([texts[i]]), slot=1).dense.tobytes()
