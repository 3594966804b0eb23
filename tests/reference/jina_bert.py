"""JinaBERT in plain torch, written from its paper (arXiv:2310.19923) and ALiBi's (arXiv:2108.12409).

transformers has no class for it. Modules are named as the tensors of jina-embeddings-v2's files.
"""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn


def slopes(heads: int) -> list[float]:
    """A geometric series from 2^(-8 / heads); between powers of two, the lower one's and half of the
    upper one's.
    """
    if math.log2(heads).is_integer():
        return [2 ** (-8 * (i + 1) / heads) for i in range(heads)]
    lower = 2 ** math.floor(math.log2(heads))
    return slopes(lower) + slopes(2 * lower)[::2][: heads - lower]


class Named(nn.Module):  # type: ignore[misc]  # torch is not installed where types are checked
    """Modules by name, as deep as their names have dots."""

    def __init__(self, /, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


class Layer(nn.Module):  # type: ignore[misc]
    def __init__(self, hidden: int, inner: int, heads: int, eps: float) -> None:
        super().__init__()
        self.heads = heads
        own = Named(**{name: nn.Linear(hidden, hidden) for name in ("query", "key", "value")})
        output = Named(dense=nn.Linear(hidden, hidden), LayerNorm=nn.LayerNorm(hidden, eps))
        self.attention = Named(self=own, output=output)
        self.mlp = Named(
            gated_layers=nn.Linear(hidden, 2 * inner, bias=False),
            wo=nn.Linear(inner, hidden),
            layernorm=nn.LayerNorm(hidden, eps),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Of one text `[tokens, hidden]`."""
        length, attention, mlp = len(x), self.attention, self.mlp
        own = attention.self
        q, k, v = (
            part(x).view(length, self.heads, -1).transpose(0, 1)
            for part in (own.query, own.key, own.value)
        )
        places = torch.arange(length)
        distance = (places[:, None] - places[None, :]).abs()
        falls = torch.tensor(slopes(self.heads))[:, None, None] * distance
        weights = torch.softmax(q @ k.transpose(1, 2) / math.sqrt(q.shape[-1]) - falls, -1)
        mixed = (weights @ v).transpose(0, 1).reshape(length, -1)
        x = attention.output.LayerNorm(x + attention.output.dense(mixed))
        gate, up = mlp.gated_layers(x).chunk(2, -1)
        return mlp.layernorm(x + mlp.wo(nn.functional.gelu(gate) * up))


class JinaBertModel(nn.Module):  # type: ignore[misc]
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = config
        hidden, eps = config["hidden_size"], config["layer_norm_eps"]
        self.embeddings = Named(
            word_embeddings=nn.Embedding(config["vocab_size"], hidden),
            token_type_embeddings=nn.Embedding(2, hidden),
            LayerNorm=nn.LayerNorm(hidden, eps),
        )
        layers = (
            Layer(hidden, config["intermediate_size"], config["num_attention_heads"], eps)
            for _ in range(config["num_hidden_layers"])
        )
        self.encoder = Named(layer=nn.ModuleList(layers))

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        """Token ids `[1, tokens]` to an object with `last_hidden_state` `[1, tokens, hidden]`."""
        parts = self.embeddings
        x = parts.word_embeddings(input_ids[0]) + parts.token_type_embeddings.weight[0]
        x = parts.LayerNorm(x)
        for layer in self.encoder.layer:
            x = layer(x)
        return SimpleNamespace(last_hidden_state=x[None])

    def save_pretrained(self, folder: Path) -> None:
        files = "jinaai/jina-bert-implementation--modeling_bert.JinaBertModel"
        config = self.config | {"model_type": "bert", "auto_map": {"AutoModel": files}}
        (folder / "config.json").write_text(json.dumps(config))
        save_file(self.state_dict(), folder / "model.safetensors")
