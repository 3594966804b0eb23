# ruff: noqa: E402 - what is imported below needs what is asked for above it
"""BGE-M3's three vectors beside FlagEmbedding's own code and transformers, on a dummy of its shape.

Two layers by default. The whole model, some minutes and 12 GB of memory:

    BGE_M3_LAYERS=24 make test-reference ARGS=tests/reference/test_bge_m3_reference.py
"""

import gc
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the reference runs on torch")
flag = pytest.importorskip("FlagEmbedding", reason="the reference is FlagEmbedding")
transformers = pytest.importorskip("transformers", reason="the reference is transformers")

from tests.support.dummy import blueprint_of, write_dummy

from trivec.backends.openvino import OpenVinoBackend
from trivec.backends.openvino.calibrate import read_sentences
from trivec.backends.openvino.packing import as_batch
from trivec.backends.openvino.quantise import FP32, make_tensors
from trivec.backends.openvino.session import Session
from trivec.checkpoints import open_checkpoint
from trivec.checkpoints.checkpoint import Checkpoint
from trivec.core.types import Output, Row, Sequences, Vectors
from trivec.models.scoring import fused_score

pytestmark = pytest.mark.reference

LAYERS = int(os.environ.get("BGE_M3_LAYERS", "2"))
TOLERANCE = 1e-4
LONG_TOKENS = (600, 2048, 8192)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, shared_data: Path) -> Path:
    made = tmp_path_factory.mktemp("bge-m3") / "model"
    blueprint = blueprint_of("baai/bge-m3").with_layers(LAYERS)
    write_dummy(made, blueprint, tokenizer_file=shared_data / "xlmr-tokenizer" / "tokenizer.json")
    return made


@pytest.fixture(scope="module")
def checkpoint(folder: Path) -> Checkpoint:
    return open_checkpoint(str(folder), cache_dir=folder.parent / "cache")


@pytest.fixture(scope="module")
def reference(folder: Path) -> Any:
    return flag.BGEM3FlagModel(
        str(folder), use_fp16=False, devices=["cpu"], normalize_embeddings=True
    )


@pytest.fixture(scope="module")
def texts(reference: Any) -> list[str]:
    """A sentence in each script, tiny texts, and ones of 600 to 8,192 tokens."""
    sentences = [pair[0] for pair in read_sentences().values()]
    body = " ".join(sentences)
    tokens = len(reference.tokenizer(body)["input_ids"]) - 2
    long = [" ".join([body] * (length // tokens + 1)) for length in LONG_TOKENS]
    return ["a", "no", *sentences, *long]


@pytest.fixture(scope="module")
def ids(reference: Any, texts: list[str]) -> list[list[int]]:
    """FlagEmbedding's own token ids: here only the arithmetic is compared."""
    limits = [8192] * (len(texts) - len(LONG_TOKENS)) + list(LONG_TOKENS)
    return [
        reference.tokenizer(text, truncation=True, max_length=limit)["input_ids"]
        for text, limit in zip(texts, limits, strict=True)
    ]


@pytest.fixture(scope="module")
def expected(reference: Any, texts: list[str]) -> dict[str, list[Any]]:
    """What FlagEmbedding says, one text at a time, so that it pads nothing."""
    found: dict[str, list[Any]] = {"dense_vecs": [], "lexical_weights": [], "colbert_vecs": []}
    limits = [8192] * (len(texts) - len(LONG_TOKENS)) + list(LONG_TOKENS)
    for text, limit in zip(texts, limits, strict=True):
        answer = reference.encode(
            [text],
            max_length=limit,
            return_dense=True,
            return_sparse=True,
            return_colbert_vecs=True,
        )
        for kind, values in found.items():
            values.append(answer[kind][0])
    return found


@pytest.fixture(scope="module")
def ours(
    checkpoint: Checkpoint, ids: list[list[int]], tmp_path_factory: pytest.TempPathFactory
) -> Vectors:
    cache = tmp_path_factory.mktemp("fp32")
    backend = OpenVinoBackend.load(checkpoint, precision="fp32", cores=1, cache_dir=cache)
    found = backend.run(as_batch(Sequences.pack(ids), checkpoint.outputs), slot=0)
    backend.close()
    gc.collect()
    return found


def test_texts_reach_from_3_to_8192_tokens(ids: list[list[int]]) -> None:
    lengths = [len(one) for one in ids]
    assert (min(lengths), max(lengths)) == (3, 8192)


def test_dense_equals_flagembedding(ours: Vectors, expected: dict[str, list[Any]]) -> None:
    np.testing.assert_allclose(ours.dense, np.array(expected["dense_vecs"]), atol=TOLERANCE, rtol=0)


def test_sparse_equals_flagembedding(ours: Vectors, expected: dict[str, list[Any]]) -> None:
    for sparse, lexical in zip(ours.sparse, expected["lexical_weights"], strict=True):
        assert sparse is not None
        theirs = {int(token): float(weight) for token, weight in lexical.items()}
        assert sparse.token_ids.tolist() == sorted(theirs)
        weights = [theirs[token] for token in sorted(theirs)]
        np.testing.assert_allclose(sparse.weights, weights, atol=TOLERANCE, rtol=0)


def test_multi_equals_flagembedding(ours: Vectors, expected: dict[str, list[Any]]) -> None:
    for multi, theirs in zip(ours.multi, expected["colbert_vecs"], strict=True):
        assert multi is not None
        assert multi.shape == theirs.shape
        np.testing.assert_allclose(multi, theirs, atol=TOLERANCE, rtol=0)


def test_scores_of_all_five_fusion_modes_equal_flagembedding(
    reference: Any, texts: list[str], ours: Vectors
) -> None:
    pairs = [(i, j) for i in range(2, 8) for j in range(8, 12)]
    theirs = reference.compute_score(
        [(texts[i], texts[j]) for i, j in pairs], weights_for_different_modes=[0.4, 0.2, 0.7]
    )
    dense, sparse, multi = {Output.DENSE: 0.4}, {Output.SPARSE: 0.2}, {Output.MULTI: 0.7}
    modes = {
        "dense": dense,
        "sparse": sparse,
        "colbert": multi,
        "sparse+dense": dense | sparse,
        "colbert+sparse+dense": dense | sparse | multi,
    }
    for mode, weights in modes.items():
        found = [
            fused_score(rows_of(ours, i, weights), rows_of(ours, j, weights), weights)
            for i, j in pairs
        ]
        np.testing.assert_allclose(found, theirs[mode], atol=TOLERANCE, rtol=0, err_msg=mode)


def rows_of(vectors: Vectors, i: int, outputs: Iterable[Output]) -> dict[Output, Row]:
    return {output: cast("Row", vectors[output][i]) for output in outputs}


def test_hidden_states_equal_transformers(
    checkpoint: Checkpoint, folder: Path, ids: list[list[int]]
) -> None:
    chosen = [ids[0], ids[20], ids[-3]]
    model = transformers.XLMRobertaModel.from_pretrained(folder, add_pooling_layer=False).eval()
    session = Session(checkpoint, make_tensors(checkpoint, FP32), FP32, slot_count=1)
    for one in chosen:
        found = session.hidden(np.array(one, np.int32), slot=0)
        with torch.inference_mode():
            theirs = model(input_ids=torch.tensor([one])).last_hidden_state[0].numpy()
        scale = max(1.0, float(np.abs(theirs).max()))  # outlier channels are 12 times the others
        assert float(np.abs(found - theirs).max()) <= TOLERANCE * scale


def test_int8_keeps_the_vectors_beside_outlier_channels(
    checkpoint: Checkpoint,
    ours: Vectors,
    ids: list[list[int]],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Dense and every row of multi to a cosine of 0.99, sparse the same ten largest ids to 95 %."""
    backend = OpenVinoBackend.load(
        checkpoint, precision="int8", cores=1, cache_dir=tmp_path_factory.mktemp("int8")
    )
    found = backend.run(as_batch(Sequences.pack(ids), checkpoint.outputs), slot=0)
    assert (found.dense * ours.dense).sum(axis=1).min() >= 0.99
    overlaps = []
    for i in range(len(ids)):
        multi, exact = found.multi[i], ours.multi[i]
        assert multi is not None
        assert exact is not None
        assert (multi * exact).sum(axis=1).min() >= 0.99
        overlaps.append(top_overlap(found, ours, i))
    assert np.mean(overlaps) >= 0.95


def top_overlap(found: Vectors, exact: Vectors, i: int) -> float:
    tops = []
    for vectors in (found, exact):
        sparse = vectors.sparse[i]
        assert sparse is not None
        tops.append(set(sparse.token_ids[np.argsort(-sparse.weights)[:10]].tolist()))
    return len(tops[0] & tops[1]) / max(1, len(tops[1]))
