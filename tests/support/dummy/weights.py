"""Seeded random weights of any family, scaled so that a deep model still tells texts and tokens apart.

Three things go wrong with plain random weights. Vectors collapse: each layer mixes all tokens
until every text looks alike. Where attention is made sharp against that, rounding errors grow
until int8 is unrecognisable. And activations are tame, where trained XLM-R models have a few
channels twenty times larger than the rest. The numbers below were found by trial on 2 to 24
layers.
"""

from collections.abc import Iterator
from math import sqrt
from zlib import crc32

import numpy as np

from trivec.core.types import Float32Array
from trivec.models.bert import BertConfig
from trivec.models.ops import ModelConfig, layer_of

PIECE_ELEMENTS = 2**20
# The first layer's attention writes the text into every token, the first one's included; what
# follows changes it gently, or rounding would grow from layer to layer as no trained model's does.
FIRST_ATTENTION_GAIN = 5.0
ATTENTION_SHARPNESS = 1.4  # gain of queries and keys: each token attends to some others
ATTENTION_SHARE = 0.5  # what all other attention layers together add to a token, as a gain
FEED_FORWARD_SHARE = 0.7
POSITION_GAIN = 0.3
SPARSE_BIAS, SPARSE_GAIN = 0.2, 0.06  # lexical weights as BGE-M3's: most between 0.05 and 0.35
OUTLIERS_PER_1024 = 6
OUTLIER_SIZE = 12.5  # with what is added to it, twenty times the median magnitude
# What a matrix is, by how its layer's name ends in BERT, ModernBERT and Qwen3.
QUERIES_AND_KEYS = (".query", ".key", ".attn.q", ".attn.k", ".q_proj", ".k_proj")
ATTENTION_OUTPUTS = (".attention.output.dense", ".attn.Wo", ".o_proj")
FEED_FORWARD_OUTPUTS = (".output.dense", ".mlp.Wo", ".down_proj")
EMBEDDING_GAINS = {
    "embeddings.position_embeddings.weight": POSITION_GAIN,
    "embeddings.token_type_embeddings.weight": 0.1,
}


class RandomWeights:
    """Every tensor of one model and its heads, the same for the same config and seed.

    Outlier channels are made in the BERT family only.
    """

    def __init__(self, config: ModelConfig, *, seed: int) -> None:
        self._config = config
        self._seed = seed
        outlier_count = config.hidden_size * OUTLIERS_PER_1024 // 1024
        if not isinstance(config, BertConfig):
            outlier_count = 0
        chosen = np.random.default_rng([seed, 1]).choice(
            config.hidden_size, outlier_count, replace=False
        )
        self.outliers = np.sort(chosen)  # [outliers]; channels of the hidden states

    def pieces(self, name: str, shape: tuple[int, ...], *, stored_type: str) -> Iterator[bytes]:
        """The little-endian bytes of tensor *name*, a few rows at a time."""
        if len(shape) == 1:
            yield encode(self._vector(name, shape[0]), stored_type)
            return
        rows, columns = shape
        rng = self._rng(name)
        column_gains = self._column_gains(name, columns)
        step = max(1, PIECE_ELEMENTS // columns)
        for row in range(0, rows, step):
            block = rng.standard_normal((min(step, rows - row), columns), np.float32)
            block *= column_gains
            yield encode(block, stored_type)

    def _rng(self, name: str) -> np.random.Generator:
        """A generator of the tensor's own, so that no tensor depends on the order of writing."""
        return np.random.default_rng([self._seed, 2, crc32(name.encode())])

    def _column_gains(self, name: str, columns: int) -> Float32Array:
        """What standard normal rows are multiplied by: `[columns]`."""
        gains = np.full(columns, _gain(name, columns, self._config.num_hidden_layers), np.float32)
        if name.endswith(
            (
                "query.weight",
                "key.weight",
                "value.weight",
                "intermediate.dense.weight",
                "linear.weight",
            )
        ):
            gains[self.outliers] /= 20  # trained models give outlier channels small weights too
        return gains

    def _vector(self, name: str, size: int) -> Float32Array:
        """Biases and LayerNorms: `[size]`."""
        if name == "sparse_linear.bias":
            return np.full(size, SPARSE_BIAS, np.float32)
        if "norm" not in name.lower():
            return self._rng(name).standard_normal(size, np.float32) * np.float32(0.02)
        vector = np.full(size, float(name.endswith("weight")), np.float32)
        if self._has_outliers(name):
            if name.endswith("output.LayerNorm.bias") and "attention" not in name:
                signs = self._rng("outliers").choice([-1.0, 1.0], len(self.outliers))
                vector[self.outliers] = OUTLIER_SIZE * signs
            elif name.endswith("attention.output.LayerNorm.weight"):
                vector[self.outliers] = 0.1  # or each layer would add to the one before
        return vector

    def _has_outliers(self, name: str) -> bool:
        """Whether *name* is of a layer from the second up."""
        return name.startswith("encoder.layer.") and not name.startswith("encoder.layer.0.")


def _gain(name: str, columns: int, layer_count: int) -> float:
    """Standard deviation of a weight matrix with *columns* inputs."""
    layer, gain = name.removesuffix(".weight"), 1.0
    if "embed" in name:
        return EMBEDDING_GAINS.get(name, gain)
    if layer.endswith(QUERIES_AND_KEYS):
        gain = ATTENTION_SHARPNESS
    elif layer.endswith(ATTENTION_OUTPUTS):
        share = ATTENTION_SHARE / sqrt(layer_count)
        gain = FIRST_ATTENTION_GAIN if layer_of(name) == 0 else share
    elif layer.endswith(FEED_FORWARD_OUTPUTS):
        gain = FEED_FORWARD_SHARE / sqrt(layer_count)
    elif name.startswith("sparse_linear"):
        gain = SPARSE_GAIN
    return gain / sqrt(columns)


def encode(array: Float32Array, stored_type: str) -> bytes:
    """*array* as little-endian float32, float16 or bfloat16 (rounded to nearest)."""
    if stored_type == "F16":
        return array.astype("<f2").tobytes()
    if stored_type == "BF16":
        return ((array.view(np.uint32) + 0x8000) >> 16).astype("<u2").tobytes()
    assert stored_type == "F32"
    return array.astype("<f4", copy=False).tobytes()
