"""A family of models made up for tests: what somebody writes who adds one, and a checkpoint of it.

One layer with attention over all tokens, of a width that no real model has. `register` puts it into
the registry for the length of a test; nothing else in `src` knows of it.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import msgspec
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import save_file
from tokenizers import models, pre_tokenizers, processors

from trivec.models import registry
from trivec.models.ops import Activation, AttentionSpec, Index, Linear, ModelConfig, Ops, Table

T = TypeVar("T")

WORDS = ["<s>", "</s>", "<unk>", *(f"w{i}" for i in range(29))]


class ConfigFile(msgspec.Struct, frozen=True):
    """`config.json` of the family."""

    model_type: str
    width: int
    heads: int
    words: int
    positions: int


def read_config(config: Mapping[str, object]) -> ModelConfig:
    found = msgspec.convert(config, ConfigFile)
    return ModelConfig(
        family=found.model_type,
        hidden_size=found.width,
        num_hidden_layers=1,
        num_attention_heads=found.heads,
        intermediate_size=2 * found.width,
        vocab_size=found.words,
        max_position_embeddings=found.positions,
        position_offset=0,
        pad_token_id=0,
    )


def forward(ops: Ops[T], config: ModelConfig) -> T:
    width, heads = config.hidden_size, config.num_attention_heads
    x = ops.embed(Table("words", config.vocab_size, width), Index.ID)
    parts = [Linear(f"layers.0.{name}", width) for name in "qkv"]
    q, k, v = ops.linear(x, *parts)
    attended = ops.attention(q, k, v, AttentionSpec(heads, width // heads, heads))
    return ops.block(after_attention, "layers.0", config, ops.keep(x), ops.keep(attended))


def after_attention(ops: Ops[T], config: ModelConfig, x: T, attended: T) -> T:
    width, inner = config.hidden_size, config.intermediate_size
    x = ops.add(x, ops.linear(attended, Linear("out", width))[0])
    mlp = ops.mlp(x, Linear("up", inner), Linear("down", width), Activation.GELU)
    return ops.layer_norm(ops.add(x, mlp), "norm", eps=1e-6)


FAMILY = registry.Family(
    read_config=read_config, forward=forward, prefixes=("",), key_tensor="words.weight", unused=()
)


def register(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let models of the type "toy" be served."""
    monkeypatch.setitem(registry.FAMILIES, "toy", FAMILY)


def write_checkpoint(folder: Path) -> Path:
    """A whole model in the sentence-transformers layout; the family must be registered."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "model_type": "toy", "width": 48, "heads": 4, "words": len(WORDS), "positions": 32
    }  # fmt: skip
    draw = np.random.default_rng(0)
    shapes = registry.tensor_shapes(read_config(config))
    tensors = {
        name: 0.3 * draw.standard_normal(shape, np.float32) for name, shape in shapes.items()
    }
    save_file(tensors, folder / "model.safetensors")
    tokenizer = tokenizers.Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    pooling = {"word_embedding_dimension": 48, "pooling_mode_mean_tokens": True}
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {
            "idx": 1,
            "name": "1",
            "path": "1_Pooling",
            "type": "sentence_transformers.models.Pooling",
        },
    ]
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    for name, content in (("config.json", config), ("modules.json", modules)):
        (folder / name).write_text(json.dumps(content))
    return folder
