"""A complete checkpoint of seeded random weights, in the hub's own layout, where real ones are not at hand.

For benchmarks and for tests of everything but meaning. Streamed: memory stays far below the
size of what is written, and the same blueprint and seed give the same bytes everywhere.
"""

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from types import MappingProxyType

from tests.support.dummy.tokenizer import special_token_names, write_tokenizer
from tests.support.dummy.torch_writer import write_torch_file
from tests.support.dummy.weights import RandomWeights

from trivec.checkpoints.tensor_files import write_safetensors
from trivec.core.errors import CheckpointRefused
from trivec.models.bert import BertConfig
from trivec.models.modernbert import FULL, SLIDING, ModernBertConfig
from trivec.models.ops import ModelConfig
from trivec.models.pooling import Pooling
from trivec.models.qwen3 import Qwen3Config
from trivec.models.registry import FAMILIES, tensor_shapes

ARCHITECTURES = {
    "bert": "BertModel",
    "roberta": "RobertaModel",
    "xlm-roberta": "XLMRobertaModel",
    "modernbert": "ModernBertModel",
    "qwen3": "Qwen3Model",
}


@dataclass(frozen=True, slots=True)
class Blueprint:
    """What a dummy looks like from outside."""

    config: ModelConfig
    pooling: Pooling
    normalize: bool
    token_count_max: int
    multi_dimensions: int | None  # None: no sparse and multi-vector heads
    torch_files: bool  # `.bin` and `.pt` as BGE-M3 ships, or safetensors
    stored_type: str = "F32"  # of the encoder; heads are float16

    def with_layers(self, layer_count: int) -> "Blueprint":
        """The same model with another number of layers."""
        config = self.config
        if isinstance(config, ModernBertConfig):
            types = config.layer_types
            types = tuple(types[i % len(types)] for i in range(layer_count))
            config = replace(config, layer_types=types)
        return replace(self, config=replace(config, num_hidden_layers=layer_count))


BLUEPRINTS: Mapping[str, Blueprint] = MappingProxyType(
    {
        "baai/bge-m3": Blueprint(
            config=BertConfig(
                family="xlm-roberta",
                hidden_size=1024,
                num_hidden_layers=24,
                num_attention_heads=16,
                intermediate_size=4096,
                layer_norm_eps=1e-5,
                vocab_size=250_002,
                max_position_embeddings=8194,
                position_offset=2,
                type_vocab_size=1,
                pad_token_id=1,
            ),
            pooling=Pooling.CLS,
            normalize=True,
            token_count_max=8192,
            multi_dimensions=1024,
            torch_files=True,
        ),
        "all-minilm-l6-v2": Blueprint(
            config=BertConfig(
                family="bert",
                hidden_size=384,
                num_hidden_layers=6,
                num_attention_heads=12,
                intermediate_size=1536,
                layer_norm_eps=1e-12,
                vocab_size=30_522,
                max_position_embeddings=512,
                position_offset=0,
                type_vocab_size=2,
                pad_token_id=0,
            ),
            pooling=Pooling.MEAN,
            normalize=True,
            token_count_max=256,
            multi_dimensions=None,
            torch_files=False,
        ),
        "answerdotai/modernbert-base": Blueprint(
            config=ModernBertConfig(
                family="modernbert",
                hidden_size=768,
                num_hidden_layers=22,
                num_attention_heads=12,
                intermediate_size=1152,
                vocab_size=50_368,
                max_position_embeddings=8192,
                position_offset=0,
                pad_token_id=50_283,
                norm_eps=1e-5,
                layer_types=tuple(SLIDING if i % 3 else FULL for i in range(22)),
                sliding_window=64,
                rope_thetas=(160_000.0, 10_000.0),
                norm_bias=False,
                attention_bias=False,
                mlp_bias=False,
            ),
            pooling=Pooling.MEAN,
            normalize=True,
            token_count_max=8192,
            multi_dimensions=None,
            torch_files=False,
        ),
        "qwen/qwen3-embedding-0.6b": Blueprint(
            config=Qwen3Config(
                family="qwen3",
                hidden_size=1024,
                num_hidden_layers=28,
                num_attention_heads=16,
                intermediate_size=3072,
                vocab_size=151_669,
                max_position_embeddings=32_768,
                position_offset=0,
                pad_token_id=151_643,
                num_key_value_heads=8,
                head_dim=128,
                rms_norm_eps=1e-6,
                rope_theta=1_000_000.0,
                attention_bias=False,
                is_causal=True,
            ),
            pooling=Pooling.LAST,
            normalize=True,
            token_count_max=32_768,
            multi_dimensions=None,
            torch_files=False,
            stored_type="BF16",
        ),
    }
)


def blueprint_of(model_id: str) -> Blueprint:
    """The blueprint of a public id. Raises `CheckpointRefused` where there is none."""
    blueprint = BLUEPRINTS.get(model_id.lower())
    if blueprint is None:
        raise CheckpointRefused(
            f"there is no dummy of {model_id!r}; there are dummies of {', '.join(BLUEPRINTS)}"
        )
    return blueprint


def write_dummy(
    folder: Path, blueprint: Blueprint, *, seed: int = 0, tokenizer_file: Path | None = None
) -> None:
    """Write the checkpoint into *folder*, which is made, and must be empty.

    Without *tokenizer_file* a small tokenizer is made on the spot. Raises `CheckpointRefused`
    when the folder holds files already.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise CheckpointRefused(f"{folder}: is not empty; give a new folder for the dummy")
    _write_layout(folder, blueprint)
    if tokenizer_file is not None:
        shutil.copyfile(tokenizer_file, folder / "tokenizer.json")
    else:
        write_tokenizer(
            folder / "tokenizer.json",
            family=blueprint.config.family,
            vocabulary_size=blueprint.config.vocab_size,
        )
    weights = RandomWeights(blueprint.config, seed=seed)
    _write_encoder(folder, blueprint, weights)
    if blueprint.multi_dimensions is not None:
        outputs = {"sparse_linear": 1, "colbert_linear": blueprint.multi_dimensions}
        for head, count in outputs.items():
            _write_head(folder / head, blueprint, weights, outputs=count)


def _write_encoder(folder: Path, blueprint: Blueprint, weights: RandomWeights) -> None:
    """Write every tensor as the family's files have it: several layers in one matrix where fused."""
    config = blueprint.config
    shapes = tensor_shapes(config)
    if isinstance(config, BertConfig):
        hidden = config.hidden_size
        shapes = shapes | {"pooler.dense.weight": (hidden, hidden), "pooler.dense.bias": (hidden,)}
    stored: dict[str, list[str]] = {}  # name in the file to names of the model
    for name in shapes:
        layer, _, kind = name.rpartition(".")
        at = layer
        for whole, parts in FAMILIES[config.family].fused.items():
            at = next((layer.removesuffix(one) + whole for one in parts if layer.endswith(one)), at)
        stored.setdefault(f"{at}.{kind}", []).append(name)
    _write_tensors(
        folder / ("pytorch_model.bin" if blueprint.torch_files else "model.safetensors"),
        {
            whole: (sum(shapes[part][0] for part in parts), *shapes[parts[0]][1:])
            for whole, parts in stored.items()
        },
        (
            chain.from_iterable(
                weights.pieces(part, shapes[part], stored_type=blueprint.stored_type)
                for part in parts
            )
            for parts in stored.values()
        ),
        stored_type=blueprint.stored_type,
    )


def _write_head(stem: Path, blueprint: Blueprint, weights: RandomWeights, *, outputs: int) -> None:
    shapes = {"weight": (outputs, blueprint.config.hidden_size), "bias": (outputs,)}
    pieces = (
        weights.pieces(f"{stem.name}.{name}", shape, stored_type="F16")
        for name, shape in shapes.items()
    )
    file = stem.with_suffix(".pt" if blueprint.torch_files else ".safetensors")
    _write_tensors(file, shapes, pieces, stored_type="F16")


def _write_tensors(
    file: Path,
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Iterable[Iterable[bytes]],
    *,
    stored_type: str,
) -> None:
    typed = {name: (stored_type, shape) for name, shape in shapes.items()}
    if file.suffix == ".safetensors":
        write_safetensors(file, typed, tensors)
    else:
        write_torch_file(file, typed, tensors)


def _write_layout(folder: Path, blueprint: Blueprint) -> None:
    config = blueprint.config
    names = special_token_names(config.family)
    kinds = ["Transformer", "Pooling"] + ["Normalize"] * blueprint.normalize
    files: dict[str, object] = {
        "config.json": _config_file(config),
        "modules.json": [
            {
                "idx": i,
                "name": str(i),
                "path": f"{i}_{kind}" if i else "",
                "type": f"sentence_transformers.models.{kind}",
            }
            for i, kind in enumerate(kinds)
        ],
        "1_Pooling/config.json": {
            "word_embedding_dimension": config.hidden_size,
            "pooling_mode_cls_token": blueprint.pooling is Pooling.CLS,
            "pooling_mode_mean_tokens": blueprint.pooling is Pooling.MEAN,
            "pooling_mode_max_tokens": False,
            "pooling_mode_mean_sqrt_len_tokens": False,
            **({"pooling_mode_lasttoken": True} if blueprint.pooling is Pooling.LAST else {}),
        },
        "sentence_bert_config.json": {
            "max_seq_length": blueprint.token_count_max,
            "do_lower_case": False,
        },
        "special_tokens_map.json": names,
        "tokenizer_config.json": names
        | {
            "model_max_length": blueprint.token_count_max,
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    }
    for name, content in files.items():
        file = folder / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _config_file(config: ModelConfig) -> dict[str, object]:
    shared: dict[str, object] = {
        "architectures": [ARCHITECTURES[config.family]],
        "hidden_size": config.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "model_type": config.family,
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "pad_token_id": config.pad_token_id,
        "torch_dtype": "float32",
        "vocab_size": config.vocab_size,
    }
    own: dict[str, object] = {}
    if isinstance(config, BertConfig):
        own = {
            "attention_probs_dropout_prob": 0.1,
            "bos_token_id": 0,
            "eos_token_id": 2,
            "hidden_act": "gelu",
            "hidden_dropout_prob": 0.1,
            "layer_norm_eps": config.layer_norm_eps,
            "position_embedding_type": "absolute",
            "type_vocab_size": config.type_vocab_size,
        }
    elif isinstance(config, ModernBertConfig):
        own = {
            "norm_eps": config.norm_eps,
            "layer_types": list(config.layer_types),
            "local_attention": 2 * config.sliding_window,
            "global_rope_theta": config.rope_thetas[0],
            "local_rope_theta": config.rope_thetas[1],
            "norm_bias": config.norm_bias,
            "attention_bias": config.attention_bias,
            "mlp_bias": config.mlp_bias,
        }
    elif isinstance(config, Qwen3Config):
        own = {
            "num_key_value_heads": config.num_key_value_heads,
            "head_dim": config.head_dim,
            "rms_norm_eps": config.rms_norm_eps,
            "rope_theta": config.rope_theta,
            "attention_bias": config.attention_bias,
            "use_bidirectional_attention": not config.is_causal,
        }
    return dict(sorted((shared | own).items()))
