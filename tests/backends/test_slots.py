"""Whether slots share one compiled model or have one each: a question of memory, never of bits."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from tests.backends.batches import ALL, batch_of, bits
from tests.backends.conftest import TensorsIn, random_ids

from trivec.backends.openvino.quantise import (
    FP32,
    INT8_GROUPS_32,
    INT8_ROWS,
    QuantScheme,
    make_tensors,
)
from trivec.backends.openvino.session import Session, packed_bytes, stream_count
from trivec.checkpoints.checkpoint import Checkpoint

MEBIBYTE = 1 << 20
MINILM = 10 * MEBIBYTE
BGE_M3 = 288 * MEBIBYTE


@pytest.mark.parametrize(
    ("scheme", "weights_bytes", "slot_count", "streams"),
    [
        pytest.param(INT8_ROWS, MINILM, 2, 1, id="a-small-model-is-compiled-for-each-slot"),
        pytest.param(INT8_ROWS, BGE_M3, 2, 2, id="a-large-model-is-shared"),
        pytest.param(INT8_ROWS, MINILM, 16, 16, id="many-slots-share-even-a-small-model"),
        pytest.param(FP32, 4 * MINILM, 2, 1, id="fp32-is-no-exception"),
        pytest.param(INT8_GROUPS_32, BGE_M3, 2, 1, id="a-grouped-scheme-never-shares"),
        pytest.param(FP32, BGE_M3, 1, 1, id="one-slot-has-nobody-to-share-with"),
    ],
)
def test_slots_share_a_model_where_copies_would_be_large(
    scheme: QuantScheme, weights_bytes: int, slot_count: int, streams: int
) -> None:
    assert stream_count(scheme, weights_bytes, slot_count=slot_count) == streams


def test_matrices_are_counted_and_tables_are_not(tiny_m3: Checkpoint) -> None:
    config = tiny_m3.config
    layer = 4 * config.hidden_size**2 + 2 * config.hidden_size * config.intermediate_size
    assert packed_bytes(config, make_tensors(tiny_m3, FP32)) == config.num_hidden_layers * layer * 4


@pytest.mark.parametrize("scheme", [FP32, INT8_ROWS], ids=lambda scheme: scheme.name)
def test_a_shared_model_gives_the_bits_of_one_for_each_slot(
    scheme: QuantScheme,
    tiny_m3: Checkpoint,
    tensors_in: TensorsIn,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    texts = random_ids([1, 2, 8, 15, 16, 17, 40, 64, 65, 130, 300])
    found = []
    for copies_bytes_max in (0, 1 << 40):
        monkeypatch.setattr("trivec.backends.openvino.session.COPIES_BYTES_MAX", copies_bytes_max)
        session = Session(tiny_m3, tensors_in(scheme), scheme, slot_count=2)
        batch = batch_of(texts * 2, ALL)
        with ThreadPoolExecutor(2) as pool:
            both = pool.map(lambda slot: session.run(batch, slot=slot), range(2))  # noqa: B023
            found += [[bits(vectors, i) for i in range(len(texts))] for vectors in both]
    assert all(other == found[0] for other in found[1:])
