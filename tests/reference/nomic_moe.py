"""NomicBERT v2 in plain torch, written from its paper (arXiv:2502.07972) and its files' names.

transformers has no class for it. Every second layer is a mixture of experts: the softmax over all of
them weighs the best two, whose weights stay as they are.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional


class NomicMoeModel:
    """Called as a model of transformers is; *config* has the names of its `config.json`."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config
        hidden, inner, experts = config["n_embd"], config["n_inner"], config["num_experts"]
        shapes = {
            "embeddings.word_embeddings.weight": (config["vocab_size"], hidden),
            "embeddings.token_type_embeddings.weight": (1, hidden),
            "emb_ln.weight": (hidden,),
            "emb_ln.bias": (hidden,),
        }
        for i in range(config["n_layer"]):
            own: dict[str, tuple[int, ...]] = {
                "attn.Wqkv.weight": (3 * hidden, hidden),
                "attn.Wqkv.bias": (3 * hidden,),
                "attn.out_proj.weight": (hidden, hidden),
                "attn.out_proj.bias": (hidden,),
                **{f"norm{j}.{part}": (hidden,) for j in (1, 2) for part in ("weight", "bias")},
            }
            if i % config["moe_every_n_layers"] == 1:
                own |= {
                    "mlp.router.layer.weight": (experts, hidden),
                    "mlp.experts.mlp.w1": (experts * inner, hidden),
                    "mlp.experts.mlp.w2": (experts * inner, hidden),
                    "mlp.experts.bias": (hidden,),
                }
            else:
                own |= {
                    "mlp.fc1.weight": (inner, hidden),
                    "mlp.fc1.bias": (inner,),
                    "mlp.fc2.weight": (hidden, inner),
                    "mlp.fc2.bias": (hidden,),
                }
            shapes |= {f"encoder.layers.{i}.{name}": shape for name, shape in own.items()}
        is_norm = ("norm1.weight", "norm2.weight", "emb_ln.weight")
        self.weights = {
            name: torch.ones(shape)
            if name.endswith(is_norm)
            else torch.zeros(shape)
            if len(shape) == 1
            else 0.15 * torch.randn(shape)
            for name, shape in shapes.items()
        }

    def eval(self) -> "NomicMoeModel":
        return self

    def parameters(self) -> Iterable[Tensor]:
        return self.weights.values()

    def __call__(self, input_ids: Tensor) -> SimpleNamespace:
        """Token ids `[1, tokens]` to an object with `last_hidden_state` `[1, tokens, hidden]`."""
        words = self.weights["embeddings.word_embeddings.weight"][input_ids[0]]
        types = self.weights["embeddings.token_type_embeddings.weight"][0]
        x = self._norm(words + types, "emb_ln")
        for i in range(self.config["n_layer"]):
            at = f"encoder.layers.{i}"
            x = self._norm(x + self._attended(x, f"{at}.attn"), f"{at}.norm1")
            has_experts = i % self.config["moe_every_n_layers"] == 1
            network = self._experts if has_experts else self._network
            x = self._norm(x + network(x, f"{at}.mlp"), f"{at}.norm2")
        return SimpleNamespace(last_hidden_state=x[None])

    def save_pretrained(self, folder: Path) -> None:
        code = "nomic-ai/nomic-bert-2048--modeling_hf_nomic_bert.NomicBertModel"
        config = self.config | {"model_type": "nomic_bert", "auto_map": {"AutoModel": code}}
        (folder / "config.json").write_text(json.dumps(config))
        save_file(self.weights, folder / "model.safetensors")

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return functional.linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def _norm(self, x: Tensor, name: str) -> Tensor:
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return functional.layer_norm(
            x, weight.shape, weight, bias, self.config["layer_norm_epsilon"]
        )

    def _attended(self, x: Tensor, at: str) -> Tensor:
        heads = self.config["n_head"]
        q, k, v = (
            part.unflatten(-1, (heads, -1)).transpose(0, 1)
            for part in self._linear(x, f"{at}.Wqkv").chunk(3, -1)
        )
        half = q.shape[-1] // 2
        speeds = self.config["rotary_emb_base"] ** (-torch.arange(half) / half)
        angles = torch.arange(len(x))[:, None] * speeds
        turns = torch.polar(torch.ones_like(angles), angles)
        q, k = (
            torch.cat([turned.real, turned.imag], -1)
            for turned in (torch.complex(*one.chunk(2, -1)) * turns for one in (q, k))
        )
        weights = torch.softmax(q @ k.transpose(1, 2) * q.shape[-1] ** -0.5, -1)
        return self._linear((weights @ v).transpose(0, 1).flatten(1), f"{at}.out_proj")

    def _network(self, x: Tensor, at: str) -> Tensor:
        return self._linear(functional.gelu(self._linear(x, f"{at}.fc1")), f"{at}.fc2")

    def _experts(self, x: Tensor, at: str) -> Tensor:
        """Each token alone, through the experts that it is routed to."""
        count = self.config["num_experts"]
        w1, w2 = (self.weights[f"{at}.experts.mlp.w{i}"].chunk(count) for i in (1, 2))
        shares = torch.softmax(x @ self.weights[f"{at}.router.layer.weight"].T, -1)
        weights, chosen = shares.topk(self.config["moe_top_k"], -1)
        rows = []
        for token, own, experts in zip(x, weights, chosen.tolist(), strict=True):
            parts = (
                weight * (functional.gelu(w1[one] @ token) @ w2[one])
                for weight, one in zip(own, experts, strict=True)
            )
            rows.append(sum(parts, self.weights[f"{at}.experts.bias"]))
        return torch.stack(rows)
