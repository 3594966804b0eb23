"""The two engines beside each other: torch and OpenVINO, same checkpoint, fp32, all three vectors."""

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="the torch backend needs torch")
pytest.importorskip("openvino", reason="the other engine is OpenVINO's")

from tests.checkpoints.tiny import write_tiny

from trivec.backends.openvino import OpenVinoBackend
from trivec.backends.torch.backend import TorchBackend
from trivec.checkpoints import open_checkpoint
from trivec.checkpoints.checkpoint import Checkpoint
from trivec.core.types import Batch, Sequences
from trivec.models.pooling import Pooling

pytestmark = pytest.mark.reference

LENGTHS = (1, 2, 3, 16, 17, 100, 129, 512, 1_000, 2_049, 8_192)
POSITIONS = 8_194  # BGE-M3's: a text of 8,192 tokens whose first stands at 2


def opened(folder: Path, *, family: str, pooling: Pooling, heads: bool) -> Checkpoint:
    write_tiny(
        folder / "model", family=family, pooling=pooling, heads=heads, position_count=POSITIONS
    )
    return open_checkpoint(str(folder / "model"), cache_dir=folder / "cache")


def batch_for(checkpoint: Checkpoint) -> Batch:
    draw = np.random.default_rng(11)
    vocabulary_size = checkpoint.config.vocab_size
    packed = Sequences.pack(
        [draw.integers(4, vocabulary_size, length, dtype=np.int32) for length in LENGTHS]
    )
    outputs = np.full(len(LENGTHS), checkpoint.outputs, np.uint8)
    return Batch(packed.token_ids, packed.cu_seqlens, outputs)


@pytest.mark.parametrize(
    ("family", "pooling", "heads"),
    [
        pytest.param("xlm-roberta", Pooling.CLS, True, id="bge-m3-s-form"),
        pytest.param("bert", Pooling.MEAN, False, id="minilm-s-form"),
    ],
)
def test_torch_equals_openvino_at_fp32(
    tmp_path: Path, family: str, pooling: Pooling, heads: bool
) -> None:
    checkpoint = opened(tmp_path, family=family, pooling=pooling, heads=heads)
    batch = batch_for(checkpoint)
    ours = TorchBackend.load(checkpoint, precision="fp32", device="cpu")
    theirs = OpenVinoBackend.load(
        checkpoint, precision="fp32", cores=1, cache_dir=tmp_path / "compiled"
    )
    found, expected = ours.run(batch, slot=0), theirs.run(batch, slot=0)
    theirs.close()
    ours.close()
    np.testing.assert_allclose(found.dense, expected.dense, atol=1e-4, rtol=0)
    assert [one is None for one in found.sparse] == [not heads] * len(LENGTHS)
    for one, other in zip(found.sparse, expected.sparse, strict=True):
        if one is not None and other is not None:
            np.testing.assert_array_equal(one.token_ids, other.token_ids)
            np.testing.assert_allclose(one.weights, other.weights, atol=1e-4, rtol=0)
    for rows, other_rows in zip(found.multi, expected.multi, strict=True):
        assert (rows is None) == (other_rows is None)
        if rows is not None and other_rows is not None:
            np.testing.assert_allclose(rows, other_rows, atol=1e-4, rtol=0)
