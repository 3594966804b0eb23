"""A checkpoint's arrays on a device: every weight taken once, layers that share an input stacked.

Matrices and tables get the encoder's type; LayerNorm and the heads stay in fp32.
"""

import numpy as np
import torch

from trivec.backends.torch.encoder import TYPE, Encoder
from trivec.backends.torch.heads import DeviceHeads, Head
from trivec.checkpoints.checkpoint import Checkpoint
from trivec.core.types import Float32Array
from trivec.models.registry import plan_of


def load_encoder(checkpoint: Checkpoint, *, device: torch.device, dtype: torch.dtype) -> Encoder:
    """The encoder of *checkpoint*. Raises `CheckpointRefused` unless every tensor has its use."""
    plan = plan_of(checkpoint.config)
    loaded = {TYPE: torch.empty(0, dtype=dtype, device=device)}
    with checkpoint.weights() as weights:
        for group in plan.linears:
            has_bias = f"{group.names[0]}.bias" in plan.shapes
            for part in ("weight", "bias") if has_bias else ("weight",):
                stacked = np.concatenate([weights.take(f"{name}.{part}") for name in group.names])
                loaded[f"{group.names[0]}.{part}"] = place(stacked, device, dtype)
        linear = {name for group in plan.linears for name in group.names}
        for name, shape in plan.shapes.items():
            if name.rpartition(".")[0] not in linear:
                is_table = len(shape) == 2
                loaded[name] = place(
                    weights.take(name), device, dtype if is_table else torch.float32
                )
        weights.finish()
    blocks = {
        at: {TYPE: loaded[TYPE]}
        | {
            name.removeprefix(f"{at}."): tensor
            for name, tensor in loaded.items()
            if name.startswith(f"{at}.")
        }
        for at in plan.blocks
    }
    rope = {
        spec.rope: (place(cosine, device, torch.float32), place(sine, device, torch.float32))
        for spec in dict.fromkeys(plan.attention)
        if spec.rope is not None
        for cosine, sine in [spec.rope.tables(spec.head_dim)]
    }
    return Encoder(checkpoint.config, loaded, blocks, rope)


def load_heads(checkpoint: Checkpoint, *, device: torch.device) -> DeviceHeads:
    """Pooling and, where the checkpoint has them, the sparse and multi-vector heads, in fp32."""
    heads = checkpoint.heads
    fp32 = torch.float32
    return DeviceHeads(
        pooling=checkpoint.pooling,
        normalize=checkpoint.normalize,
        vocabulary_size=checkpoint.config.vocab_size,
        sparse=None
        if heads is None
        else Head(place(heads.sparse_weight, device, fp32), place(heads.sparse_bias, device, fp32)),
        multi=None
        if heads is None
        else Head(place(heads.multi_weight, device, fp32), place(heads.multi_bias, device, fp32)),
        ignored_token_ids=None
        if heads is None
        else torch.tensor(heads.ignored_token_ids, dtype=torch.int32, device=device),
    )


def place(array: Float32Array, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """A copy of *array* on *device*: the files' own memory is only lent, and may be read-only."""
    return torch.tensor(array, dtype=dtype, device=device)
