"""A checkpoint's arrays on a device: every weight taken once, queries, keys and values fused.

Matrices and tables get the encoder's type; LayerNorm and the heads stay in fp32.
"""

import numpy as np
import torch

from trivec.backends.torch.encoder import Embeddings, Encoder, Layer, Linear, Norm
from trivec.backends.torch.heads import DeviceHeads
from trivec.checkpoints.checkpoint import Checkpoint
from trivec.checkpoints.weights import Weights
from trivec.core.types import Float32Array


class Upload:
    """Weights on their way to one device in one type."""

    def __init__(self, weights: Weights, *, device: torch.device, dtype: torch.dtype) -> None:
        self._weights = weights
        self._device = device
        self._dtype = dtype

    def table(self, name: str) -> torch.Tensor:
        return place(self._weights.take(name), self._device, self._dtype)

    def linear(self, *names: str) -> Linear:
        """The linear maps *names* of one input, stacked into one product."""
        weights = [self._weights.take(f"{name}.weight") for name in names]
        biases = [self._weights.take(f"{name}.bias") for name in names]
        return Linear(
            place(np.concatenate(weights), self._device, self._dtype),
            place(np.concatenate(biases), self._device, self._dtype),
        )

    def norm(self, name: str, eps: float) -> Norm:
        return Norm(
            place(self._weights.take(f"{name}.weight"), self._device, torch.float32),
            place(self._weights.take(f"{name}.bias"), self._device, torch.float32),
            eps,
        )


def load_encoder(checkpoint: Checkpoint, *, device: torch.device, dtype: torch.dtype) -> Encoder:
    """The encoder of *checkpoint*. Raises `CheckpointRefused` unless every tensor has its use."""
    config = checkpoint.config
    with checkpoint.weights() as weights:
        upload = Upload(weights, device=device, dtype=dtype)
        encoder = Encoder(
            Embeddings(
                words=upload.table("embeddings.word_embeddings.weight"),
                positions=upload.table("embeddings.position_embeddings.weight"),
                token_types=upload.table("embeddings.token_type_embeddings.weight"),
                norm=upload.norm("embeddings.LayerNorm", config.layer_norm_eps),
            ),
            tuple(
                _load_layer(upload, f"encoder.layer.{i}", config.layer_norm_eps)
                for i in range(config.num_hidden_layers)
            ),
            config.num_attention_heads,
        )
        weights.finish()
    return encoder


def _load_layer(upload: Upload, at: str, eps: float) -> Layer:
    self_attention = (f"{at}.attention.self.{part}" for part in ("query", "key", "value"))
    return Layer(
        qkv=upload.linear(*self_attention),
        attention_output=upload.linear(f"{at}.attention.output.dense"),
        attention_norm=upload.norm(f"{at}.attention.output.LayerNorm", eps),
        inner=upload.linear(f"{at}.intermediate.dense"),
        output=upload.linear(f"{at}.output.dense"),
        output_norm=upload.norm(f"{at}.output.LayerNorm", eps),
    )


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
        else Linear(
            place(heads.sparse_weight, device, fp32), place(heads.sparse_bias, device, fp32)
        ),
        multi=None
        if heads is None
        else Linear(place(heads.multi_weight, device, fp32), place(heads.multi_bias, device, fp32)),
        ignored_token_ids=None
        if heads is None
        else torch.tensor(heads.ignored_token_ids, dtype=torch.int32, device=device),
    )


def place(array: Float32Array, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """A copy of *array* on *device*: the files' own memory is only lent, and may be read-only."""
    return torch.tensor(array, dtype=dtype, device=device)
