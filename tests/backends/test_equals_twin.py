"""The OpenVINO encoder and the vectorised heads against the slow twin, in every family we serve."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from tests.backends.batches import ALL, batch_of
from tests.backends.conftest import OpenTiny, random_ids
from tests.support.families import FAMILIES
from tests.support.numpy_ops import Twin

from trivec.backends.openvino import OpenVinoBackend
from trivec.backends.openvino.packing import pack_micro_batch, plan_micro_batches
from trivec.backends.openvino.quantise import FP32, make_tensors
from trivec.backends.openvino.session import Session
from trivec.checkpoints.checkpoint import Checkpoint
from trivec.core.types import Batch, Output
from trivec.models.pooling import Pooling

LENGTHS = [1, 2, 3, 17, 40, 40, 129, 513]


def fp32(checkpoint: Checkpoint, folder: Path) -> OpenVinoBackend:
    return OpenVinoBackend.load(checkpoint, precision="fp32", cores=1, cache_dir=folder)


POOLED = [  # every pooling of one family; of the others those that their models have
    pytest.param(family, pooling, id=f"{family}-{pooling.value}")
    for family in FAMILIES
    for pooling in Pooling
    if family == "bert"
    or pooling in (Pooling.CLS, Pooling.MEAN)
    or (pooling is Pooling.LAST and family in ("qwen3", "gemma3_text"))
]


@pytest.mark.parametrize(("family", "pooling"), POOLED)
def test_dense_equals_the_twin_for_every_family_and_pooling(
    open_tiny: OpenTiny, tmp_path: Path, family: str, pooling: Pooling
) -> None:
    checkpoint = open_tiny(family, pooling)
    texts = random_ids(LENGTHS)
    backend = fp32(checkpoint, tmp_path)
    found = backend.run(batch_of(texts), slot=0).dense
    twin = Twin(checkpoint)
    expected = np.array([twin.vectors(ids).dense for ids in texts])
    np.testing.assert_allclose(found, expected, atol=5e-6, rtol=0)
    for i in (0, 3, 7):  # the same bits alone and beside others
        assert backend.run(batch_of([texts[i]]), slot=0).dense.tobytes() == found[i].tobytes()


def test_a_mean_without_a_prompt_equals_the_twin_alone_and_beside_others(
    open_tiny: OpenTiny, tmp_path: Path
) -> None:
    """In micro-batches, of which each has its own sequences' counts."""
    checkpoint = open_tiny("bert", Pooling.MEAN)
    texts = random_ids(LENGTHS)
    skip = np.array([0, 1, 2, 5, 0, 39, 7, 100], np.int32)
    backend, twin = fp32(checkpoint, tmp_path), Twin(checkpoint)
    found = backend.run(replace(batch_of(texts), skip=skip), slot=0).dense
    for i, ids in enumerate(texts):
        expected = twin.hidden(ids)[skip[i] :].mean(axis=0)
        if checkpoint.normalize:
            expected = expected / np.linalg.norm(expected)
        np.testing.assert_allclose(found[i], expected, atol=5e-6, rtol=0)
        alone = replace(batch_of([ids]), skip=skip[i : i + 1])
        assert backend.run(alone, slot=0).dense.tobytes() == found[i].tobytes()


def test_chunks_equal_the_twin_alone_and_beside_others(open_tiny: OpenTiny, tmp_path: Path) -> None:
    checkpoint = open_tiny("bert", Pooling.MEAN)
    texts = random_ids([40, 5, 129, 513, 3])
    spans = [[1, 7, 39], [0], [1, 2, 100, 128], [3, 500], [0, 3]]
    chunks = tuple(np.array(own, np.int32) for own in spans)
    asked = [Output.DENSE if len(own) == 1 else Output.CHUNKS for own in spans]
    backend, twin = fp32(checkpoint, tmp_path), Twin(checkpoint)
    found = backend.run(replace(batch_of(texts, asked), chunks=chunks), slot=0).chunks
    assert [one is None for one in found] == [False, True, False, False, False]
    for i in (0, 2, 3, 4):
        hidden, own = twin.hidden(texts[i]), found[i]
        means = np.array([hidden[a:b].mean(axis=0) for a, b in pairwise(spans[i])])
        if checkpoint.normalize:
            means /= np.linalg.norm(means, axis=1, keepdims=True)
        assert own is not None
        np.testing.assert_allclose(own, means, atol=5e-6, rtol=0)
        one = replace(batch_of([texts[i]], Output.CHUNKS), chunks=(chunks[i],))
        (alone,) = backend.run(one, slot=0).chunks
        assert alone is not None
        assert alone.tobytes() == own.tobytes()


def test_sparse_and_multi_equal_the_twin(tiny_m3: Checkpoint, tmp_path: Path) -> None:
    texts = random_ids(LENGTHS[1:], seed=3)
    found = fp32(tiny_m3, tmp_path).run(batch_of(texts, ALL), slot=0)
    twin = Twin(tiny_m3)
    for i, ids in enumerate(texts):
        expected = twin.vectors(ids)
        sparse, multi = found.sparse[i], found.multi[i]
        assert sparse is not None
        assert multi is not None
        assert sparse.token_ids.tolist() == sorted(expected.sparse)
        weights = [expected.sparse[token] for token in sparse.token_ids.tolist()]
        np.testing.assert_allclose(sparse.weights, weights, atol=2e-5, rtol=0)
        np.testing.assert_allclose(multi, expected.multi, atol=2e-5, rtol=0)


def test_token_types_choose_their_embedding(open_tiny: OpenTiny, tmp_path: Path) -> None:
    """The same ids with the second half of type 1, as a cross-encoder sends them."""
    backend = fp32(open_tiny("bert", Pooling.MEAN), tmp_path)
    plain = batch_of(random_ids([20]))
    types = np.repeat(np.array([0, 1], np.int32), 10)
    typed = Batch(plain.token_ids, plain.cu_seqlens, plain.outputs, types)
    zeros = Batch(plain.token_ids, plain.cu_seqlens, plain.outputs, np.zeros(20, np.int32))
    assert np.array_equal(backend.run(plain, slot=0).dense, backend.run(zeros, slot=0).dense)
    assert np.abs(backend.run(plain, slot=0).dense - backend.run(typed, slot=0).dense).max() > 1e-3


@pytest.mark.parametrize(
    ("family", "mask"),
    [
        pytest.param("qwen3", (768, 768), id="causal"),
        pytest.param("modernbert", (16, 48), id="band"),
    ],
)
def test_a_mask_costs_a_byte_a_pair_of_tokens_that_may_meet(
    open_tiny: OpenTiny, family: str, mask: tuple[int, int]
) -> None:
    """Of all pairs float32 would take 256 MiB at 8,192 tokens, and so would each step towards it."""
    checkpoint = open_tiny(family, Pooling.MEAN)
    session = Session(checkpoint, make_tensors(checkpoint, FP32), FP32, slot_count=1)
    session.run(batch_of(random_ids([650])), slot=0)
    precisions = []  # of what has a number for each of these pairs
    for node in session._compiled[0].get_runtime_model().get_ordered_ops():
        info = node.get_rt_info()
        assert info["layerType"].astype(str) != "Softmax", "attention is one kernel"
        shapes = [output.get_partial_shape() for output in node.outputs()]
        ends = [tuple(one.to_shape())[-2:] for one in shapes if one.is_static]
        assert mask == (768, 768) or (768, 768) not in ends
        if mask in ends:
            precisions.append(info["outputPrecisions"].astype(str))
    assert precisions == ["u8"]


@pytest.mark.parametrize("family", ["modernbert", "qwen3", "gemma3_text"])
def test_rotary_positions_are_one_kernel(open_tiny: OpenTiny, family: str) -> None:
    """Apart from each other its eight steps take three times as long."""
    checkpoint = open_tiny(family, Pooling.MEAN)
    session = Session(checkpoint, make_tensors(checkpoint, FP32), FP32, slot_count=1)
    nodes = session._compiled[0].get_runtime_model().get_ordered_ops()
    kinds = [node.get_rt_info()["layerType"].astype(str) for node in nodes]
    assert kinds.count("RoPE") == 2 * checkpoint.config.num_hidden_layers


@pytest.mark.parametrize("family", ["mpnet", "jina_bert"])
def test_a_bias_by_distance_leaves_attention_in_one_kernel(
    open_tiny: OpenTiny, family: str
) -> None:
    """Apart from each other products and softmax take half as long again."""
    checkpoint = open_tiny(family, Pooling.MEAN)
    session = Session(checkpoint, make_tensors(checkpoint, FP32), FP32, slot_count=1)
    nodes = session._compiled[0].get_runtime_model().get_ordered_ops()
    kinds = {node.get_rt_info()["layerType"].astype(str) for node in nodes}
    assert kinds.isdisjoint({"MatMul", "Softmax"})


@pytest.mark.parametrize(
    ("keeps_last", "kept"), [(False, [0, 2, 3, 4]), (True, [1, 2, 3, 4])], ids=["cls", "last"]
)
def test_of_a_sequence_only_the_pooled_token_passes_the_last_layer(
    keeps_last: bool, kept: list[int]
) -> None:
    """The first or the last of two tokens; all three of the sequence whose outputs need them."""
    batch = batch_of([[10, 11], [12, 13, 14]])
    (members,) = plan_micro_batches(np.diff(batch.cu_seqlens))
    whole = np.array([False, True])
    packed = pack_micro_batch(batch, members, whole=whole, keeps_last=keeps_last, position_offset=0)
    assert sorted(packed.kept_token_ids.tolist()) == [10 + i for i in kept]
    assert packed.kept_cu_seqlens.tolist() == [0, 3, 4]  # the longer sequence comes first
