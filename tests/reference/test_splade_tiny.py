# ruff: noqa: E402 - what is imported below needs what is asked for above it
"""SPLADE-tiny, with its real weights, beside transformers on 200 texts."""

import csv
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the reference runs on torch")
transformers = pytest.importorskip("transformers", reason="the reference is transformers")

from tests.reference.packaged_weights import SPLADE_TINY, fetch

from trivec.backends.openvino import OpenVinoBackend
from trivec.backends.torch.backend import TorchBackend
from trivec.checkpoints import open_checkpoint
from trivec.checkpoints.checkpoint import Checkpoint
from trivec.core.ports import Backend
from trivec.core.types import Batch, Float32Array, LongText, Output, SparseVector
from trivec.tokenizer import Tokenizer

pytestmark = pytest.mark.reference
TOP = 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fetch(SPLADE_TINY, tmp_path_factory.mktemp("splade")) / "cognition" / "model"


@pytest.fixture(scope="module")
def checkpoint(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(f"splade-tiny={folder}", cache_dir=tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def texts(shared_data: Path) -> list[str]:
    with (shared_data / "stsb" / "stsb-en-dev.csv").open(encoding="utf-8") as lines:
        return [row[0] for row in csv.reader(lines)][:200]


@pytest.fixture(scope="module")
def expected(folder: Path, texts: list[str]) -> Float32Array:
    """log(1 + relu(logit)), the maximum over the tokens: `[texts, vocabulary]`."""
    model: Any = transformers.AutoModelForMaskedLM.from_pretrained(folder).eval()
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
    rows = []
    for text in texts:
        with torch.inference_mode():
            logits = model(**tokenizer(text, return_tensors="pt")).logits[0]
        rows.append(torch.log1p(torch.relu(logits)).max(dim=0).values.numpy())
    return np.array(rows, np.float32)


async def sparse_of(
    backend: Backend, checkpoint: Checkpoint, texts: list[str]
) -> list[SparseVector]:
    with ThreadPoolExecutor(1) as pool:
        tokenizer = Tokenizer(
            checkpoint.tokenizer_file,
            token_count_max=checkpoint.token_count_max,
            vocabulary_size=checkpoint.config.vocab_size,
            pool=pool,
        )
        read = await tokenizer.tokenize(texts, long_text=LongText.REFUSE)
    flags = np.full(len(read), Output.SPARSE, np.uint8)
    found = backend.run(Batch(read.token_ids, read.cu_seqlens, flags), slot=0).sparse
    return [one for one in found if one is not None]


def top_tokens(row: Float32Array) -> list[int]:
    order: list[int] = np.argsort(-row, kind="stable")[: min(TOP, np.count_nonzero(row))].tolist()
    return order


@pytest.mark.parametrize("name", ["openvino", "torch"])
async def test_the_top_tokens_and_their_weights_are_transformers(
    name: str, checkpoint: Checkpoint, texts: list[str], expected: Float32Array, tmp_path: Path
) -> None:
    backend: Backend = (
        OpenVinoBackend.load(checkpoint, precision="fp32", cores=1, cache_dir=tmp_path)
        if name == "openvino"
        else TorchBackend.load(checkpoint, precision="fp32", device="cpu")
    )
    found = await sparse_of(backend, checkpoint, texts)
    assert len(found) == 200
    for own, row in zip(found, expected, strict=True):
        dense = np.zeros_like(row)
        dense[own.token_ids] = own.weights
        np.testing.assert_allclose(dense, row, atol=1e-4, rtol=0)
        assert top_tokens(dense) == top_tokens(row)


async def test_int8_keeps_the_weights_or_is_refused(
    checkpoint: Checkpoint, texts: list[str], expected: Float32Array, tmp_path: Path
) -> None:
    backend = OpenVinoBackend.load(checkpoint, precision="auto", cores=1, cache_dir=tmp_path)
    assert backend.certificate is not None
    logging.getLogger(__name__).info("%s", backend.certificate.summary)
    is_served = backend.certificate.passes and backend.certificate.is_faster
    assert (backend.precision == "int8") == is_served
    assert [*backend.certificate.cosines] == ["sparse"]
    found = await sparse_of(backend, checkpoint, texts)
    shares = [
        len({*top_tokens(row)} & {*own.token_ids[np.argsort(-own.weights)[:TOP]].tolist()}) / TOP
        for own, row in zip(found, expected, strict=True)
    ]
    assert np.mean(shares) > 0.9
