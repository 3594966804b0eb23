"""A tiny seeded checkpoint of every family in the registry, written without any other library."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tests.checkpoints.tiny import write_tiny

from trivec.checkpoints import open_checkpoint
from trivec.checkpoints.checkpoint import Checkpoint
from trivec.models import registry
from trivec.models.pooling import Pooling

VOCABULARY_SIZE, HIDDEN, POSITIONS = 2000, 128, 700
CONFIGS: Mapping[str, Mapping[str, object]] = {  # of the families that `write_tiny` does not write
    "camembert": {"intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4},
    "distilbert": {"dim": HIDDEN, "n_layers": 2, "n_heads": 4, "hidden_dim": 160},
    "mpnet": {"intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4},
    "nomic_bert": {"intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4},
    "nomic_bert-of-experts": {
        "model_type": "nomic_bert",
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "hidden_act": "gelu",
        "num_experts": 4,
        "moe_top_k": 2,
        "moe_every_n_layers": 2,
        "type_vocab_size": 1,
    },
    "new": {
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "rope_scaling": {"type": "ntk", "factor": 8.0},
    },
    "gte": {
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "type_vocab_size": 1,
    },
    "jina_bert": {
        "model_type": "bert",
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "position_embedding_type": "alibi",
        "feed_forward_type": "geglu",
    },
    "modernbert": {
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "local_attention": 16,
        "global_attn_every_n_layers": 3,
        "norm_bias": True,
    },
    "gemma3_text": {
        "intermediate_size": 160,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "sliding_window": 32,
        "sliding_window_pattern": 3,
        "use_bidirectional_attention": True,
    },
    "model2vec": {"normalize": True},
    "qwen3": {
        "intermediate_size": 160,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "rope_theta": 1_000_000.0,
        "attention_bias": True,
    },
}

FAMILIES = tuple(dict.fromkeys([*registry.FAMILIES, *CONFIGS]))  # and variants that need a row


def open_family(folder: Path, family: str, pooling: Pooling) -> Checkpoint:
    """A checkpoint of *family* in *folder*, opened; CLS ones of BERT's kin have all three heads."""
    written = CONFIGS.get(family)
    write_tiny(
        folder / "model",
        family="bert" if written else family,
        pooling=Pooling.CLS,
        hidden=HIDDEN,
        vocabulary_size=VOCABULARY_SIZE,
        heads=pooling is Pooling.CLS and not written,
        position_count=POSITIONS,
    )
    if written is None:
        opened = open_checkpoint(str(folder / "model"), cache_dir=folder / "cache")
        return replace(opened, pooling=(pooling,))
    if family == "model2vec":
        return replace(open_static(folder), pooling=(pooling,))
    config = {
        "model_type": family,
        "hidden_size": HIDDEN,
        "vocab_size": VOCABULARY_SIZE,
        "max_position_embeddings": POSITIONS,
        "pad_token_id": 1,
        **written,
    }
    (folder / "model" / "config.json").write_text(json.dumps(config))
    draw = np.random.default_rng(3)
    tensors: dict[str, np.ndarray] = {}
    for name, shape in registry.tensor_shapes(registry.read_config(config)).items():
        noise = draw.standard_normal(shape).astype(np.float32)
        if len(shape) == 2:
            tensors[name] = noise * np.float32(shape[1] ** -0.5)
        else:  # norms around one, biases around zero
            tensors[name] = (0.2 * noise + name.lower().endswith("norm.weight")).astype(np.float32)
    described = registry.FAMILIES[registry.read_config(config).family]
    for whole, parts in described.fused.items():
        for first in [name for name in tensors if f"{parts[0]}." in name]:
            at, kind = first.split(parts[0])
            split = [tensors.pop(f"{at}{part}{kind}") for part in parts]
            tensors[f"{at}{whole}{kind}"] = np.concatenate(split)
    tensors |= {
        name: tensor.T.copy()
        for name, tensor in tensors.items()
        if name.endswith(described.transposed)
    }
    save_file(tensors, next((folder / "model").glob("*.safetensors")))
    opened = open_checkpoint(str(folder / "model"), cache_dir=folder / "cache")
    return replace(opened, pooling=(pooling,))


def open_static(folder: Path, **tensors: np.ndarray) -> Checkpoint:
    """A static model in *folder*, whose tokenizer is there; of *tensors* where they are given."""
    for part in ("modules.json", "1_Pooling/config.json", "2_Normalize"):
        (folder / "model" / part).unlink(missing_ok=True)
    (folder / "model" / "config.json").write_text(
        json.dumps({"model_type": "model2vec", **CONFIGS["model2vec"]})
    )
    draw = np.random.default_rng(3)
    table = draw.standard_normal((VOCABULARY_SIZE, HIDDEN)).astype(np.float32)
    save_file({"embeddings": table, **tensors}, next((folder / "model").glob("*.safetensors")))
    return open_checkpoint(str(folder / "model"), cache_dir=folder / "cache")
