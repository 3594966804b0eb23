"""Scores, SPLADE's weights, token vectors and layers after pooling against the slow twin."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tests.backends.batches import batch_of
from tests.backends.conftest import random_ids
from tests.support.heads import HIDDEN, add_module, write_classifier, write_masked_lm
from tests.support.numpy_ops import Twin

from trivec.backends.openvino import OpenVinoBackend
from trivec.backends.openvino.calibrate import (
    Certificate,
    CosineStatistics,
    make_probes,
    rank_agreement,
)
from trivec.backends.openvino.graph import build_head
from trivec.backends.openvino.quantise import INT8_CONV_W7, INT8_ROWS, WEIGHT_MAX, QuantScheme
from trivec.checkpoints import open_checkpoint
from trivec.checkpoints.checkpoint import Checkpoint
from trivec.core.types import Batch, Output
from trivec.models.pooling import HeadLinear, MultiHead, Nonlinearity, Pooling, erf

LENGTHS = [2, 3, 17, 40, 129, 513]


def opened(folder: Path) -> Checkpoint:
    return open_checkpoint(str(folder), cache_dir=folder.parent / "cache")


def fp32(checkpoint: Checkpoint, folder: Path) -> OpenVinoBackend:
    return OpenVinoBackend.load(checkpoint, precision="fp32", cores=1, cache_dir=folder)


def pairs_batch(texts: list[list[int]]) -> Batch:
    """*texts* as pairs: the second half of each has the token type 1."""
    plain = batch_of(texts, Output.SCORE)
    types = [np.arange(len(ids)) >= len(ids) // 2 for ids in texts]
    return replace(plain, token_types=np.concatenate(types).astype(np.int32))


@pytest.mark.parametrize("labels", [1, 3])
def test_scores_equal_the_twin_and_do_not_depend_on_the_batch(tmp_path: Path, labels: int) -> None:
    checkpoint = opened(write_classifier(tmp_path / "model", labels=labels))
    assert (checkpoint.outputs, checkpoint.labels) == (Output.SCORE, labels)
    texts, twin = random_ids(LENGTHS), Twin(checkpoint)
    batch, backend = pairs_batch(texts), fp32(checkpoint, tmp_path / "kept")
    found = backend.run(batch, slot=0)
    assert {*found.rows} == {Output.SCORE}
    assert batch.token_types is not None
    types = np.split(batch.token_types, batch.cu_seqlens[1:-1])
    for i, ids in enumerate(texts):
        expected = twin.vectors(ids, types[i].tolist()).dense
        np.testing.assert_allclose(found.score[i], expected, atol=2e-5, rtol=0)
        alone = backend.run(batch.take(np.array([i])), slot=0).score
        assert alone.tobytes() == found.score[i].tobytes()


@pytest.mark.parametrize(
    ("family", "first", "last"),
    [
        ("bert", "pooler.dense", "classifier"),
        ("xlm-roberta", "classifier.dense", "classifier.out_proj"),
    ],
)
def test_a_classifiers_head_is_two_layers_with_tanh_between(
    tmp_path: Path, family: str, first: str, last: str
) -> None:
    """By the file's own tensors, which the twin does not look up for itself."""
    folder = write_classifier(tmp_path / "model", family=family, labels=2)
    checkpoint, stored = opened(folder), load_file(folder / "model.safetensors")
    (ids,) = random_ids([20])
    inner = np.tanh(
        stored[f"{first}.weight"] @ Twin(checkpoint).hidden(ids)[0] + stored[f"{first}.bias"]
    )
    expected = stored[f"{last}.weight"] @ inner + stored[f"{last}.bias"]
    found = fp32(checkpoint, tmp_path / "kept").run(batch_of([ids], Output.SCORE), slot=0).score
    np.testing.assert_allclose(found[0], expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("family", ["xlm-roberta", "roberta"])
def test_robertas_head_has_a_layer_of_its_own(tmp_path: Path, family: str) -> None:
    checkpoint = opened(write_classifier(tmp_path / "model", family=family))
    texts = random_ids([9, 30])
    found = fp32(checkpoint, tmp_path / "kept").run(batch_of(texts, Output.SCORE), slot=0)
    expected = [Twin(checkpoint).vectors(ids).dense for ids in texts]
    np.testing.assert_allclose(found.score, expected, atol=2e-5, rtol=0)


def test_splade_equals_the_twin_and_does_not_depend_on_the_batch(tmp_path: Path) -> None:
    checkpoint = opened(write_masked_lm(tmp_path / "model"))
    assert checkpoint.outputs is Output.SPARSE
    assert checkpoint.dimensions == checkpoint.config.vocab_size
    texts, twin = random_ids(LENGTHS), Twin(checkpoint)
    backend = fp32(checkpoint, tmp_path / "kept")
    found = backend.run(batch_of(texts, Output.SPARSE), slot=0)
    assert {*found.rows} == {Output.SPARSE}
    for ids, own in zip(texts, found.sparse, strict=True):
        assert own is not None
        expected = twin.vectors(ids).sparse
        weights = {token: weight for token, weight in expected.items() if weight > 1e-5}
        near = dict(zip(own.token_ids.tolist(), own.weights.tolist(), strict=True))
        assert weights.keys() <= near.keys() <= expected.keys() | near.keys()
        for token, weight in near.items():
            assert weight == pytest.approx(expected.get(token, 0.0), abs=2e-5)
        alone = backend.run(batch_of([ids], Output.SPARSE), slot=0).sparse[0]
        assert alone is not None
        assert alone.weights.tobytes() == own.weights.tobytes()


def test_token_vectors_equal_the_twin(tmp_path: Path) -> None:
    checkpoint = opened(write_masked_lm(tmp_path / "model"))
    weight = np.random.default_rng(0).standard_normal((48, HIDDEN)).astype(np.float32)
    head = MultiHead((HeadLinear(weight, None),), normalize=True, skipped_token_ids=(7, 8))
    checkpoint = replace(checkpoint, token_head=head)
    assert (checkpoint.outputs, checkpoint.dimensions) == (Output.MULTI, 48)
    texts = [[2, 5, 7, 9, 3], *random_ids([40])]
    found = fp32(checkpoint, tmp_path / "kept").run(batch_of(texts, Output.MULTI), slot=0).multi
    for ids, own in zip(texts, found, strict=True):
        expected = Twin(checkpoint).vectors(ids).multi[~np.isin(ids, (7, 8))]
        assert own is not None
        np.testing.assert_allclose(own, expected, atol=2e-5, rtol=0)


def test_queries_have_every_row_and_nothing_sees_what_fills_them_up(tmp_path: Path) -> None:
    """By themselves, beside others, and with fewer fillers the same."""
    weight = np.random.default_rng(0).standard_normal((48, HIDDEN)).astype(np.float32)
    marker, filler = 4, 6
    head = MultiHead((HeadLinear(weight, None),), True, (7, 8), marker, filler)
    checkpoint = opened(write_masked_lm(tmp_path / "model"))
    backend = fp32(replace(checkpoint, token_head=head), tmp_path / "kept")
    query, document = [2, marker, 7, 9, 3], [2, 5, 7, 9, filler, 8, 3]
    texts = [query + 11 * [filler], document, query + 2 * [filler], query, random_ids([300])[0]]
    found = backend.run(batch_of(texts, Output.MULTI), slot=0).multi
    assert [len(rows) for rows in found if rows is not None][:4] == [16, 5, 7, 5]
    for ids, rows in zip(texts, found, strict=True):
        alone = backend.run(batch_of([ids], Output.MULTI), slot=0).multi[0]
        assert rows is not None
        assert alone is not None
        assert alone.tobytes() == rows.tobytes()
    filled, without = found[0], found[3]
    assert filled is not None
    assert without is not None
    np.testing.assert_allclose(filled[:5], without, atol=2e-6, rtol=0)
    plain = replace(head, unattended_token_id=None)
    backend = fp32(replace(checkpoint, token_head=plain), tmp_path / "kept")
    seen = backend.run(batch_of(texts[:1], Output.MULTI), slot=0).multi[0]
    assert seen is not None
    assert np.abs(seen[:5] - without).max() > 1e-3


def test_layers_after_pooling_equal_the_twin(tmp_path: Path) -> None:
    """Two poolings, a Dense module with tanh, a LayerNorm, L2, and the first numbers of it."""
    folder = write_masked_lm(tmp_path / "model")
    (folder / "modules.json").write_text(
        '[{"type": "sentence_transformers.models.Transformer", "path": ""}]'
    )
    (folder / "1_Pooling").rmdir()
    add_module(folder, "Pooling", {"pooling_mode": ["max", "mean"]})
    draw = np.random.default_rng(1)
    weight = draw.standard_normal((32, 2 * HIDDEN), np.float32) / 8
    dense = {
        "in_features": 2 * HIDDEN, "out_features": 32, "bias": False,
        "activation_function": "torch.nn.modules.activation.Tanh",
    }  # fmt: skip
    add_module(folder, "Dense", dense, **{"linear.weight": weight})
    norm = {name: draw.standard_normal(32, np.float32) for name in ("norm.weight", "norm.bias")}
    add_module(folder, "LayerNorm", {"dimension": 32}, **norm)
    add_module(folder, "Normalize", {})
    (folder / "config_sentence_transformers.json").write_text('{"truncate_dim": 20}')
    checkpoint = opened(folder)
    assert checkpoint.pooling == (Pooling.MAX, Pooling.MEAN)
    assert (checkpoint.outputs, checkpoint.dimensions) == (Output.DENSE, 20)
    texts, backend = random_ids(LENGTHS), fp32(checkpoint, tmp_path / "kept")
    found = backend.run(batch_of(texts), slot=0).dense
    expected = np.array([Twin(checkpoint).vectors(ids).dense for ids in texts])
    np.testing.assert_allclose(found, expected, atol=5e-6, rtol=0)
    for i, ids in enumerate(texts):
        assert backend.run(batch_of([ids]), slot=0).dense.tobytes() == found[i].tobytes()


def test_probes_of_a_reranker_are_pairs_with_their_token_types(tmp_path: Path) -> None:
    checkpoint = opened(write_classifier(tmp_path / "model"))
    for probes in make_probes(checkpoint):
        assert len(probes) > 100
        assert probes.token_types is not None
        first = probes.token_types[: probes.cu_seqlens[1]].tolist()
        assert {*first} == {0, 1}
        assert first == sorted(first)


def test_int8_of_a_reranker_is_certified_by_the_order_of_its_scores(tmp_path: Path) -> None:
    checkpoint = opened(write_classifier(tmp_path / "model"))
    backend = OpenVinoBackend.load(
        checkpoint, precision="auto", cores=1, cache_dir=tmp_path / "kept"
    )
    certificate = backend.certificate
    assert certificate is not None
    assert certificate.rank_agreement is not None
    assert [*certificate.cosines] == ["score"]
    assert "rank agreement" in certificate.summary
    is_served = certificate.passes and certificate.is_faster
    assert (backend.precision == "int8") == is_served


@pytest.mark.parametrize(("agreement", "passes"), [(0.987, True), (0.9869, False)])
def test_scores_in_another_order_fail_the_certificate(agreement: float, passes: bool) -> None:
    good = {"score": CosineStatistics(0.9999, 0.9999)}
    certificate = Certificate("int8-rows", good, 10, 20, (), rank_agreement=agreement)
    assert certificate.passes is passes


@pytest.mark.parametrize(
    ("other", "tau"),
    [
        pytest.param([1.0, 2.0, 3.0, 4.0], 1.0, id="the-same-order"),
        pytest.param([4.0, 3.0, 2.0, 1.0], -1.0, id="the-opposite"),
        pytest.param([2.0, 1.0, 3.0, 4.0], 4 / 6, id="two-changed-places"),
        pytest.param([np.nan, 2.0, 3.0, 4.0], 0.0, id="not-a-number-agrees-with-nothing"),
    ],
)
def test_rank_agreement_is_kendalls_tau(other: list[float], tau: float) -> None:
    exact = np.array([[1.0], [2.0], [3.0], [4.0]], np.float32)
    found = rank_agreement(exact, np.array(other, np.float32)[:, None])
    assert found == pytest.approx(tau)


def test_a_head_whose_tensor_is_missing_is_refused_by_its_name(tmp_path: Path) -> None:
    folder = write_classifier(tmp_path / "model")
    tensors = dict(load_file(folder / "model.safetensors"))
    del tensors["classifier.bias"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(Exception, match=r"lacks classifier\.bias"):
        opened(folder)


def test_erf_and_gelu_are_those_of_the_standard_library() -> None:
    import math

    points = np.linspace(-5, 5, 101, dtype=np.float32)
    np.testing.assert_allclose(erf(points), [math.erf(x) for x in points.tolist()], atol=3e-7)
    identity = np.eye(1, dtype=np.float32)
    gelu = HeadLinear(identity, None, Nonlinearity.GELU)(points[:, None])[:, 0]
    expected = [x * 0.5 * (1 + math.erf(x / math.sqrt(2))) for x in points.tolist()]
    np.testing.assert_allclose(gelu, expected, atol=2e-6)


@pytest.mark.parametrize("scheme", [INT8_ROWS, INT8_CONV_W7], ids=lambda one: one.name)
def test_a_head_has_weights_of_its_schemes_bits(scheme: QuantScheme) -> None:
    """Of 8 bits where pairs of products must fit 16, a head's sums would saturate."""
    weight = np.random.default_rng(0).normal(size=(64, HIDDEN)).astype(np.float32)
    graph = build_head([HeadLinear(weight, None, Nonlinearity.IDENTITY)], scheme, rows=16)
    constants = [one for one in graph.get_ops() if one.get_type_name() == "Constant"]
    steps = [one.data for one in constants if one.get_element_type().to_string() == "i8"]
    assert [np.abs(one).max() for one in steps] == [WEIGHT_MAX[scheme.weight_bits]]
