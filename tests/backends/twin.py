"""The slow twin: a BERT-family encoder and its heads in plain numpy and loops, one text at a time.

Written from the published formulas, sharing no code with the backends it is compared with.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trivec.checkpoints.checkpoint import Checkpoint
from trivec.models.bert import BertConfig
from trivec.models.pooling import Pooling
from trivec.models.registry import tensor_shapes

Floats = NDArray[np.float64]
erf = np.vectorize(math.erf, otypes=[np.float64])


@dataclass(frozen=True, slots=True)
class TwinVectors:
    """What one text's vectors should be."""

    dense: Floats  # [hidden]
    sparse: dict[int, float]
    multi: Floats  # [tokens - 1, dimensions]


class Twin:
    """One checkpoint, in float64."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        with checkpoint.weights() as weights:
            self.tensors = {
                name: weights.take(name).astype(np.float64)
                for name in tensor_shapes(checkpoint.config)
            }

    def hidden(self, ids: list[int]) -> Floats:
        """Last hidden states of one text: `[tokens, hidden]`."""
        config, t = self.checkpoint.config, self.tensors
        places = np.arange(len(ids)) + config.position_offset
        x = t["embeddings.word_embeddings.weight"][ids]
        x = x + t["embeddings.position_embeddings.weight"][places]
        x = self.norm(x + t["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
        for layer in range(config.num_hidden_layers):
            x = self.layer(x, f"encoder.layer.{layer}.")
        return x

    def layer(self, x: Floats, at: str) -> Floats:
        q, k, v = (self.linear(x, f"{at}attention.self.{n}") for n in ("query", "key", "value"))
        width = self.checkpoint.config.hidden_size // self.checkpoint.config.num_attention_heads
        attended = np.empty_like(x)
        for head in range(self.checkpoint.config.num_attention_heads):
            own = slice(head * width, (head + 1) * width)
            scores = q[:, own] @ k[:, own].T / math.sqrt(width)
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            attended[:, own] = weights / weights.sum(axis=1, keepdims=True) @ v[:, own]
        x = self.norm(
            x + self.linear(attended, f"{at}attention.output.dense"),
            f"{at}attention.output.LayerNorm",
        )
        inner = self.linear(x, f"{at}intermediate.dense")
        inner = inner * 0.5 * (1 + erf(inner / math.sqrt(2)))
        return self.norm(x + self.linear(inner, f"{at}output.dense"), f"{at}output.LayerNorm")

    def linear(self, x: Floats, name: str) -> Floats:
        product: Floats = x @ self.tensors[f"{name}.weight"].T + self.tensors[f"{name}.bias"]
        return product

    def norm(self, x: Floats, name: str) -> Floats:
        config = self.checkpoint.config
        assert isinstance(config, BertConfig)
        spread = np.sqrt(x.var(axis=1, keepdims=True) + config.layer_norm_eps)
        unit = (x - x.mean(axis=1, keepdims=True)) / spread
        normed: Floats = unit * self.tensors[f"{name}.weight"] + self.tensors[f"{name}.bias"]
        return normed

    def vectors(self, ids: list[int]) -> TwinVectors:
        """All three kinds; sparse and multi are empty where the model has no heads."""
        hidden = self.hidden(ids)
        cls = self.checkpoint.pooling is Pooling.CLS
        pooled = hidden[0] if cls else hidden.mean(axis=0)
        dense = pooled / np.linalg.norm(pooled) if self.checkpoint.normalize else pooled
        return TwinVectors(dense, self.sparse(hidden, ids), self.multi(hidden))

    def sparse(self, hidden: Floats, ids: list[int]) -> dict[int, float]:
        heads, found = self.checkpoint.heads, dict[int, float]()
        if heads is None:
            return found
        for token, row in zip(ids, hidden, strict=True):
            weight = float(row @ heads.sparse_weight[0] + heads.sparse_bias[0])
            if weight > 0 and token not in heads.ignored_token_ids:
                found[token] = max(weight, found.get(token, 0.0))
        return found

    def multi(self, hidden: Floats) -> Floats:
        heads = self.checkpoint.heads
        if heads is None:
            return np.empty((0, 0))
        rows: Floats = hidden[1:] @ heads.multi_weight.T + heads.multi_bias
        return np.array([row / np.linalg.norm(row) for row in rows])
