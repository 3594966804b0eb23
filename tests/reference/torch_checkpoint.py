"""Small checkpoints with random weights, what transformers makes of the same weights, and a kernel."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file
from transformers import BertConfig as TheirConfig
from transformers import BertModel, XLMRobertaConfig, XLMRobertaModel

from trivec.backends.torch.attention import REFERENCE
from trivec.checkpoints.checkpoint import Checkpoint
from trivec.checkpoints.hashes import HashedFile
from trivec.core.types import Batch, Float32Array, Int32Array, Output, Sequences
from trivec.models.bert import BertConfig
from trivec.models.ops import AttentionSpec
from trivec.models.pooling import Heads, Pooling
from trivec.models.registry import tensor_shapes

ALL = Output.DENSE | Output.SPARSE | Output.MULTI

XLM_ROBERTA = BertConfig(
    family="xlm-roberta",
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=160,
    layer_norm_eps=1e-5,
    vocab_size=300,
    max_position_embeddings=8_194,
    position_offset=2,
    type_vocab_size=1,
    pad_token_id=1,
)
BERT = replace(
    XLM_ROBERTA,
    family="bert",
    layer_norm_eps=1e-12,
    max_position_embeddings=512,
    position_offset=0,
    type_vocab_size=2,
    pad_token_id=0,
)


@dataclass(frozen=True, slots=True)
class Tiny:
    """A checkpoint and, under its file's names, its weights."""

    checkpoint: Checkpoint
    weights: dict[str, Float32Array]


def write_tiny(
    folder: Path,
    config: BertConfig,
    *,
    pooling: Pooling = Pooling.CLS,
    heads: bool = True,
    scale: float = 0.15,
) -> Tiny:
    """Write a checkpoint whose random weights have the spread *scale*: texts stay well apart."""
    generator = np.random.default_rng(7)

    def drawn(*shape: int) -> Float32Array:
        return (generator.standard_normal(shape, np.float32) * np.float32(scale)).astype(np.float32)

    weights = {name: drawn(*shape) for name, shape in tensor_shapes(config).items()}
    for name in weights:
        if name.endswith("LayerNorm.weight"):
            weights[name] += 1
    file = folder / "model.safetensors"
    save_file(weights, file)
    hidden = config.hidden_size
    checkpoint = Checkpoint(
        id="tiny",
        aliases=(),
        folder=folder,
        config=config,
        pooling=(pooling,),
        normalize=True,
        token_count_max=config.token_count_max,
        tokenizer_file=folder / "tokenizer.json",
        heads=Heads(
            sparse_weight=drawn(1, hidden),
            sparse_bias=drawn(1),
            multi_weight=drawn(hidden, hidden),
            multi_bias=drawn(hidden),
            ignored_token_ids=(0, 1, 2, 3),
        )
        if heads
        else None,
        digest="0" * 64,
        verified=False,
        source="folder",
        created=0,
        owned_by="tests",
        dimensions_selectable=False,
        weight_files=(HashedFile(file, file.stat().st_size, "0" * 64),),
        cache_dir=folder,
    )
    return Tiny(checkpoint, weights)


def transformers_hidden(
    tiny: Tiny, token_ids: Int32Array, token_types: Int32Array | None = None
) -> Float32Array:
    """Last hidden states of one sequence by transformers, fp32, eager attention: [tokens, hidden]."""
    config = tiny.checkpoint.config
    is_bert = config.family == "bert"
    assert isinstance(config, BertConfig)
    theirs = (TheirConfig if is_bert else XLMRobertaConfig)(
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        intermediate_size=config.intermediate_size,
        layer_norm_eps=config.layer_norm_eps,
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_position_embeddings,
        type_vocab_size=config.type_vocab_size,
        pad_token_id=config.pad_token_id,
        attn_implementation="eager",
    )
    model = (BertModel if is_bert else XLMRobertaModel)(theirs, add_pooling_layer=False).eval()
    state = {name: torch.from_numpy(array) for name, array in tiny.weights.items()}
    unused = model.load_state_dict(state, strict=False)
    assert not unused.unexpected_keys
    assert all(name.endswith(("position_ids", "token_type_ids")) for name in unused.missing_keys)
    ids = torch.from_numpy(token_ids.astype(np.int64))[None]
    types = None if token_types is None else torch.from_numpy(token_types.astype(np.int64))[None]
    with torch.inference_mode():
        hidden = model(input_ids=ids, token_type_ids=types).last_hidden_state[0]
    found: Float32Array = hidden.numpy()
    return found


def random_batch(
    lengths: list[int], config: BertConfig, outputs: Output | list[Output] = ALL, seed: int = 1
) -> Batch:
    """Random token ids, none of them the pad id, between the ids of <s> and </s>."""
    generator = np.random.default_rng(seed)
    sequences = []
    for length in lengths:
        ids = generator.integers(4, config.vocab_size, length)
        ids[0] = 0 if config.pad_token_id != 0 else 101
        ids[-1:] = 2 if length > 1 else ids[-1:]
        sequences.append(ids.astype(np.int32))
    packed = Sequences.pack(sequences)
    wanted = outputs if isinstance(outputs, list) else [outputs] * len(lengths)
    return Batch(
        packed.token_ids, packed.cu_seqlens, np.array([int(one) for one in wanted], np.uint8)
    )


def alone(batch: Batch, i: int) -> Batch:
    """Sequence *i* of *batch* in a batch of its own."""
    token_ids = batch.token_ids[batch.cu_seqlens[i] : batch.cu_seqlens[i + 1]]
    types = batch.token_types
    return Batch(
        token_ids,
        np.array([0, len(token_ids)], np.int32),
        batch.outputs[i : i + 1],
        None if types is None else types[batch.cu_seqlens[i] : batch.cu_seqlens[i + 1]],
    )


def varlen_on_cpu(
    query: Any, key: Any, value: Any, cu_seqlens: Any, _cu_seqlens: Any, length_max: int,
    _length_max: int, *, num_splits: int | None = None, window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> object:  # fmt: skip
    """What torch's varlen_attn computes, since its kernel is CUDA's only."""
    assert num_splits == 1, "splitting keys would let neighbours in"
    lengths = torch.diff(cu_seqlens).tolist()
    assert max(lengths) <= length_max
    assert (key.shape[1] < query.shape[1]) == enable_gqa
    before, after = window_size
    spec = AttentionSpec(
        query.shape[1],
        query.shape[2],
        key.shape[1],
        causal=after == 0,
        window=None if before == -1 else before,
    )
    attend = REFERENCE.plan(cu_seqlens, tuple(lengths))
    return attend(query, key, value, spec), "log-sum-exp"
