"""The OpenVINO encoder and the vectorised heads against the slow twin, in every family we serve."""

from pathlib import Path

import numpy as np
import pytest
from tests.backends.batches import ALL, batch_of
from tests.backends.conftest import OpenTiny, random_ids
from tests.backends.twin import Twin

from trivec.backends.openvino import OpenVinoBackend
from trivec.checkpoints.checkpoint import Checkpoint
from trivec.models.pooling import Pooling

LENGTHS = [2, 3, 16, 17, 40, 40, 129, 300, 513, 600]


def fp32(checkpoint: Checkpoint, folder: Path) -> OpenVinoBackend:
    return OpenVinoBackend.load(checkpoint, precision="fp32", cores=1, cache_dir=folder)


@pytest.mark.parametrize("family", ["bert", "roberta", "xlm-roberta"])
@pytest.mark.parametrize("pooling", [Pooling.CLS, Pooling.MEAN], ids=["cls", "mean"])
def test_dense_equals_the_twin_for_every_family_and_pooling(
    open_tiny: OpenTiny, tmp_path: Path, family: str, pooling: Pooling
) -> None:
    checkpoint = open_tiny(family, pooling)
    texts = random_ids(LENGTHS)
    found = fp32(checkpoint, tmp_path).run(batch_of(texts), slot=0)
    expected = np.array([Twin(checkpoint).vectors(ids).dense for ids in texts])
    np.testing.assert_allclose(found.dense, expected, atol=2e-6, rtol=0)


def test_sparse_and_multi_equal_the_twin(tiny_m3: Checkpoint, tmp_path: Path) -> None:
    texts = random_ids(LENGTHS, seed=3)
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
    typed = type(plain)(plain.token_ids, plain.cu_seqlens, plain.outputs, types)
    zeros = type(plain)(plain.token_ids, plain.cu_seqlens, plain.outputs, np.zeros(20, np.int32))
    assert np.array_equal(backend.run(plain, slot=0).dense, backend.run(zeros, slot=0).dense)
    assert np.abs(backend.run(plain, slot=0).dense - backend.run(typed, slot=0).dense).max() > 1e-3
