"""A text's vectors do not depend on what else is in the batch, on its place, or on the load.

Decision 0002, and target 7 of the engine: difference 0.0, at fp32 and in each int8 scheme.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from tests.backends.batches import ALL, batch_of, bits
from tests.backends.conftest import OpenTiny, TensorsIn, random_ids
from tests.support.families import FAMILIES

from trivec.backends.openvino.calibrate import Calibration
from trivec.backends.openvino.quantise import (
    FP32,
    INT8_CONV,
    INT8_ROWS,
    INT8_ROWS_BF16,
    INT8_ROWS_W7,
    INT8_SCHEMES,
    QuantScheme,
    make_tensors,
)
from trivec.backends.openvino.session import Session
from trivec.checkpoints.checkpoint import Checkpoint
from trivec.core.types import Output
from trivec.models.pooling import Pooling

LENGTHS = [1, 2, 3, 5, 8, 13, 16, 17, 31, 33, 64, 65, 100, 128, 129, 200, 256, 300, 511, 512, 650]


SCHEMES = [  # the others' graphs are the same, with other numbers
    FP32,
    *(one for one in INT8_SCHEMES if one not in (INT8_ROWS_W7, INT8_CONV)),
]


@pytest.fixture(scope="module", params=SCHEMES, ids=lambda scheme: scheme.name)
def session(request: pytest.FixtureRequest, tiny_m3: Checkpoint, tensors_in: TensorsIn) -> Session:
    scheme: QuantScheme = request.param
    return Session(tiny_m3, tensors_in(scheme), scheme, slot_count=2)


def alone(session: Session, texts: list[list[int]]) -> list[tuple[bytes, ...]]:
    return [bits(session.run(batch_of([ids], ALL), slot=0), 0) for ids in texts]


def test_alone_first_last_and_among_strangers_are_the_same_bits(session: Session) -> None:
    texts = random_ids(LENGTHS)
    expected = alone(session, texts)
    draw = np.random.default_rng(1)
    for _ in range(8):
        order = draw.permutation(len(texts))[: draw.integers(2, len(texts) + 1)]
        found = session.run(batch_of([texts[i] for i in order], ALL), slot=0)
        assert [bits(found, place) for place in range(len(order))] == [expected[i] for i in order]


@pytest.mark.parametrize(
    "scheme", [FP32, INT8_ROWS, INT8_ROWS_BF16, INT8_CONV], ids=lambda one: one.name
)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_a_text_the_same_bits_alone_and_among_strangers(
    open_tiny: OpenTiny, family: str, scheme: QuantScheme
) -> None:
    checkpoint = open_tiny(family, Pooling.MEAN)
    if scheme == FP32:
        tensors = make_tensors(checkpoint, FP32)
    else:
        tensors = Calibration(checkpoint, slot_count=1).tensors(scheme)
    session = Session(checkpoint, tensors, scheme, slot_count=1)
    texts = random_ids(LENGTHS)
    together = session.run(batch_of(texts), slot=0).dense
    backwards = session.run(batch_of(texts[::-1]), slot=0).dense
    for i, ids in enumerate(texts):
        by_itself = session.run(batch_of([ids]), slot=0).dense[0].tobytes()
        assert by_itself == together[i].tobytes() == backwards[-1 - i].tobytes()


def test_both_slots_at_once_give_the_same_bits(session: Session) -> None:
    texts = random_ids(LENGTHS, seed=5)
    expected = alone(session, texts)
    batches = [batch_of(texts[slot::2] * 3, ALL) for slot in range(2)]
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda slot: session.run(batches[slot], slot=slot), range(2)))
    for slot, found in enumerate(both):
        assert [bits(found, i) for i in range(len(found))] == expected[slot::2] * 3


def test_what_others_ask_for_does_not_change_a_vector(session: Session) -> None:
    """With CLS pooling the last layer skips tokens nobody asked for; the bits must not notice."""
    texts = random_ids([20, 30, 25])
    plain = session.run(batch_of(texts, Output.DENSE), slot=0)
    mixed = session.run(batch_of(texts, [Output.DENSE, ALL, Output.DENSE]), slot=0)
    assert plain.dense.tobytes() == mixed.dense.tobytes()
    assert [one is None for one in mixed.sparse] == [True, False, True]
    assert [one is None for one in mixed.multi] == [True, False, True]


def test_memory_given_back_after_each_micro_batch_does_not_change_the_bits(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = random_ids([650, 20, 300, 5, 700])
    expected = alone(session, texts)
    monkeypatch.setattr("trivec.backends.openvino.session.LONG_TOKENS", 0)
    assert alone(session, texts) == expected
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda s: session.run(batch_of(texts, ALL), slot=s), range(2)))
    for found in both:
        assert [bits(found, i) for i in range(len(texts))] == expected


def test_a_batch_of_2048_texts_keeps_order_and_bits(session: Session) -> None:
    draw = np.random.default_rng(2)
    texts = random_ids(draw.integers(1, 40, 2048).tolist())
    found = session.run(batch_of(texts), slot=0)
    for i in draw.choice(2048, 60, replace=False).tolist():
        assert found.dense[i].tobytes() == session.run(batch_of([texts[i]]), slot=1).dense.tobytes()
