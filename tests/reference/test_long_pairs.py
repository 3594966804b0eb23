# ruff: noqa: E402 - what is imported below needs what is asked for above it
"""Scores of pairs of 1 to 8,192 tokens beside transformers', of each class with a head for them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the reference runs on torch")
pytest.importorskip("transformers", reason="the reference is transformers")

from tests.reference.test_heads import CLASSES, write

from trivec.backends.openvino import OpenVinoBackend
from trivec.checkpoints import open_checkpoint
from trivec.core.types import Batch, Output

pytestmark = pytest.mark.reference

LENGTHS = (1, 512, 2048, 8192)
POSITIONS = 8192 + 2  # XLM-R's begin behind the padding's
NAMES = [name for name, (_, _, config) in CLASSES.items() if config["num_labels"] == 1]


def with_long_positions(name: str) -> tuple[str, str, dict[str, Any]]:
    """The class *name*, of two layers, a size that attention over 8,192 tokens is quick at."""
    family, kind, config = CLASSES[name]
    layers = "n_layers" if "n_layers" in config else "num_hidden_layers"
    heads = "n_heads" if "n_heads" in config else "num_attention_heads"
    small = {layers: 2, heads: 2, "max_position_embeddings": POSITIONS}
    if name == "qwen3":
        small["head_dim"] = 32
    return family, kind, config | small


@pytest.mark.parametrize("name", NAMES)
def test_scores_of_long_pairs_equal_transformers(name: str, tmp_path: Path) -> None:
    model = write(tmp_path / "model", with_long_positions(name))
    model.set_attn_implementation("sdpa")  # the eager one takes a gigabyte at 8,192 tokens
    checkpoint = open_checkpoint(str(tmp_path / "model"), cache_dir=tmp_path / "cache")
    assert checkpoint.token_count_max >= max(LENGTHS)
    draw = np.random.default_rng(7)
    ids = [draw.integers(5, model.config.vocab_size, length) for length in LENGTHS]
    has_types = getattr(model.config, "type_vocab_size", 1) > 1
    types = [np.arange(len(one)) * 2 // len(one) * has_types for one in ids]  # half are a document
    expected = []
    for own, kind in zip(ids, types, strict=True):
        inputs = {"input_ids": torch.tensor(own[np.newaxis])}
        if has_types:
            inputs["token_type_ids"] = torch.tensor(kind[np.newaxis])
        with torch.inference_mode():
            expected.append(model(**inputs).logits[0].numpy())
    batch = Batch(
        np.concatenate(ids).astype(np.int32),
        np.cumsum([0, *LENGTHS], dtype=np.int32),
        np.full(len(ids), Output.SCORE, np.uint8),
        np.concatenate(types).astype(np.int32) if has_types else None,
    )
    backend = OpenVinoBackend.load(checkpoint, precision="fp32", cores=1, cache_dir=tmp_path)
    found = backend.run(batch, slot=0).score
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)
    assert np.ptp(expected) > 0.01, "the pairs are told apart"
