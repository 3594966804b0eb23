# ruff: noqa: E402 - what is imported below needs what is asked for above it
"""Classifiers and masked language models as transformers writes them, beside its own scores."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the torch backend needs torch")
pytest.importorskip("transformers", reason="the reference is transformers")

import transformers
from tests.support.dummy.tokenizer import SENTENCES, write_tokenizer
from tokenizers import Tokenizer as Codec

from trivec.backends.openvino import OpenVinoBackend
from trivec.backends.torch.backend import TorchBackend
from trivec.checkpoints import open_checkpoint
from trivec.checkpoints.checkpoint import Checkpoint
from trivec.core.ports import Backend
from trivec.core.types import Batch, Float32Array, LongText, Output
from trivec.tokenizer import Tokenizer

pytestmark = pytest.mark.reference

VOCABULARY_SIZE, POSITIONS = 2000, 1500
BERT = {
    "vocab_size": VOCABULARY_SIZE,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": POSITIONS,
    "initializer_range": 0.2,
}
XLM = BERT | {"type_vocab_size": 1, "pad_token_id": 1, "layer_norm_eps": 1e-5}
MODERN = BERT | {
    "local_attention": 16,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "cls_token_id": 0,
    "sep_token_id": 2,
}
DISTIL = {
    "vocab_size": VOCABULARY_SIZE,
    "dim": 64,
    "n_layers": 3,
    "n_heads": 4,
    "hidden_dim": 128,
    "max_position_embeddings": POSITIONS,
    "initializer_range": 0.2,
}
QWEN = BERT | {"num_key_value_heads": 2, "head_dim": 16}
CLASSES: dict[str, tuple[str, str, dict[str, Any]]] = {  # id: tokenizer, class, config
    "bert": ("bert", "BertForSequenceClassification", BERT | {"num_labels": 1}),
    "bert-of-three-labels": ("bert", "BertForSequenceClassification", BERT | {"num_labels": 3}),
    "xlm-roberta": ("xlm-roberta", "XLMRobertaForSequenceClassification", XLM | {"num_labels": 1}),
    "roberta": ("roberta", "RobertaForSequenceClassification", XLM | {"num_labels": 2}),
    "modernbert-cls": (
        "modernbert",
        "ModernBertForSequenceClassification",
        MODERN | {"num_labels": 1, "classifier_pooling": "cls"},
    ),
    "modernbert-mean": (
        "modernbert",
        "ModernBertForSequenceClassification",
        MODERN | {"num_labels": 1, "classifier_pooling": "mean", "classifier_bias": True},
    ),
    "distilbert": ("bert", "DistilBertForSequenceClassification", DISTIL | {"num_labels": 1}),
    "mpnet": ("xlm-roberta", "MPNetForSequenceClassification", XLM | {"num_labels": 1}),
    "gte": ("xlm-roberta", "GteForSequenceClassification", XLM | {"num_labels": 1}),
    "nomic-bert": ("bert", "NomicBertForSequenceClassification", BERT | {"num_labels": 1}),
    "qwen3": ("qwen3", "Qwen3ForSequenceClassification", QWEN | {"num_labels": 1}),
}
LANGUAGE_MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("bert", "BertForMaskedLM", BERT),
    "xlm-roberta": ("xlm-roberta", "XLMRobertaForMaskedLM", XLM),
    "distilbert": ("bert", "DistilBertForMaskedLM", DISTIL),
    "mpnet": ("xlm-roberta", "MPNetForMaskedLM", XLM),
    "modernbert": ("modernbert", "ModernBertForMaskedLM", MODERN),
}
LINES = SENTENCES.strip().splitlines()
PAIRS = [
    (LINES[i], " ".join(LINES[j : j + n]))
    for i, j, n in ((0, 1, 1), (2, 3, 1), (1, 2, 3), (4, 0, 9), (5, 5, 1), (6, 0, 1), (7, 9, 5))
]


def write(folder: Path, row: tuple[str, str, dict[str, Any]]) -> Any:
    """A seeded model of transformers, saved by it to *folder*, with a tokenizer."""
    family, name, config = row
    torch.manual_seed(5)
    model_type = getattr(transformers, name)
    made = model_type(model_type.config_class(**config, attn_implementation="eager")).eval()
    with torch.no_grad():
        for weight in made.parameters():
            if weight.ndim == 1:  # norms and biases, which start at one and at zero
                weight.add_(0.2 * torch.randn_like(weight))
    made.save_pretrained(folder)
    write_tokenizer(folder / "tokenizer.json", family=family, vocabulary_size=VOCABULARY_SIZE)
    return made


def backend_of(name: str, checkpoint: Checkpoint, folder: Path, precision: str) -> Backend:
    if name == "torch":
        return TorchBackend.load(checkpoint, precision=precision, device="cpu")
    return OpenVinoBackend.load(checkpoint, precision=precision, cores=1, cache_dir=folder)


async def batch_of_pairs(checkpoint: Checkpoint) -> Batch:
    with ThreadPoolExecutor(1) as pool:
        tokenizer = Tokenizer(
            checkpoint.tokenizer_file,
            token_count_max=checkpoint.token_count_max,
            vocabulary_size=checkpoint.config.vocab_size,
            pool=pool,
            rules=checkpoint.rules,
        )
        read = await tokenizer.tokenize_pairs(PAIRS, long_text=LongText.REFUSE)
    flags = np.full(len(read), Output.SCORE, np.uint8)
    return Batch(read.token_ids, read.cu_seqlens, flags, read.token_types)


def scores_there(model: Any, folder: Path) -> Float32Array:
    """Logits of transformers for each of PAIRS, alone: `[pairs, labels]`."""
    codec = Codec.from_file(str(folder / "tokenizer.json"))
    rows = []
    for encoding in codec.encode_batch(PAIRS):
        inputs = {"input_ids": torch.tensor([encoding.ids])}
        if getattr(model.config, "type_vocab_size", 1) > 1:
            inputs["token_type_ids"] = torch.tensor([encoding.type_ids])
        with torch.inference_mode():
            rows.append(model(**inputs).logits[0].numpy())
    return np.array(rows, np.float32)


@pytest.mark.parametrize("name", ["openvino", "torch"])
@pytest.mark.parametrize("row", CLASSES.values(), ids=CLASSES.keys())
async def test_scores_equal_transformers(
    row: tuple[str, str, dict[str, Any]], name: str, tmp_path: Path
) -> None:
    model = write(tmp_path / "model", row)
    checkpoint = open_checkpoint(str(tmp_path / "model"), cache_dir=tmp_path / "cache")
    assert (checkpoint.outputs, checkpoint.labels) == (Output.SCORE, model.config.num_labels)
    expected, batch = scores_there(model, tmp_path / "model"), await batch_of_pairs(checkpoint)
    backend = backend_of(name, checkpoint, tmp_path / "kept", "fp32")
    found = backend.run(batch, slot=0).score
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)
    np.testing.assert_allclose(backend.run_exact(batch, slot=0).score, expected, atol=1e-4, rtol=0)
    assert np.ptp(expected, axis=0).min() > 0.01, "the pairs are told apart"
    if name == "openvino":  # the same bits alone and beside others
        for i in range(len(batch)):
            alone = backend.run(batch.take(np.array([i])), slot=0).score
            assert alone.tobytes() == found[i : i + 1].tobytes()


@pytest.mark.parametrize("name", ["openvino", "torch"])
@pytest.mark.parametrize("row", LANGUAGE_MODELS.values(), ids=LANGUAGE_MODELS.keys())
def test_splade_weights_equal_transformers(
    row: tuple[str, str, dict[str, Any]], name: str, tmp_path: Path
) -> None:
    model = write(tmp_path / "model", row)
    checkpoint = open_checkpoint(str(tmp_path / "model"), cache_dir=tmp_path / "cache")
    assert checkpoint.outputs is Output.SPARSE
    codec = Codec.from_file(str(tmp_path / "model" / "tokenizer.json"))
    ids = [encoding.ids for encoding in codec.encode_batch([text for _, text in PAIRS])]
    backend = backend_of(name, checkpoint, tmp_path / "kept", "fp32")
    starts = np.cumsum([0, *map(len, ids)], dtype=np.int32)
    flags = np.full(len(ids), Output.SPARSE, np.uint8)
    found = backend.run(Batch(np.concatenate(ids).astype(np.int32), starts, flags), slot=0).sparse
    for one, own in zip(ids, found, strict=True):
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([one])).logits[0]
        expected = torch.log1p(torch.relu(logits)).max(dim=0).values.numpy()
        assert own is not None
        dense = np.zeros(VOCABULARY_SIZE, np.float32)
        dense[own.token_ids] = own.weights
        np.testing.assert_allclose(dense, expected, atol=1e-4, rtol=0)


def test_a_config_that_names_another_head_is_refused(tmp_path: Path) -> None:
    """The weights of one class under the name of another."""
    from trivec.core.errors import CheckpointRefused

    write(tmp_path / "model", CLASSES["bert"])
    file = tmp_path / "model" / "config.json"
    config = json.loads(file.read_text()) | {"architectures": ["BertForMaskedLM"]}
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointRefused, match=r"lacks cls\.predictions"):
        open_checkpoint(str(tmp_path / "model"), cache_dir=tmp_path / "cache")
