"""ModernBERT: an encoder with rotary positions, most of whose layers see a window of their neighbours.

Warner et al. 2024, arXiv:2412.13663.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

from trivec.core.types import Output
from trivec.models.config import ConfigFile, Count, Eps, Rows, Theta
from trivec.models.ops import (
    Activation,
    AttentionSpec,
    Index,
    Linear,
    ModelConfig,
    Ops,
    Rope,
    Table,
)
from trivec.models.pooling import HeadPlan, LinearName, Nonlinearity, NormName, Pooling

T = TypeVar("T")

MODEL_TYPES = ("modernbert",)
PREFIXES = ("", "model.")
KEY_TENSOR = "embeddings.tok_embeddings.weight"
UNUSED = ("head.*", "decoder.*", "classifier.*", "*.inv_freq")
# What a file keeps as one matrix, in the order of its rows.
FUSED = {"attn.Wqkv": ("attn.q", "attn.k", "attn.v"), "mlp.Wi": ("mlp.gate", "mlp.up")}

FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True, slots=True)
class ModernBertConfig(ModelConfig):
    norm_eps: float
    layer_types: tuple[str, ...]  # of each layer: FULL or SLIDING
    sliding_window: int  # tokens that a sliding layer sees on either side
    rope_thetas: tuple[float, float]  # of full layers, of sliding ones
    norm_bias: bool
    attention_bias: bool
    mlp_bias: bool

    @property
    def fp32_reason(self) -> str | None:
        """See `ModelConfig`. Without biases, as all published models are, bf16 is near enough."""
        if not (self.norm_bias or self.attention_bias or self.mlp_bias):
            return None
        return "a ModernBERT with biases has in bf16 a cosine of only 0.998 to fp32"


class _ModernBertFile(ConfigFile, frozen=True, kw_only=True):
    """`config.json`; what it leaves out has the default of transformers' own ModernBertConfig."""

    norm_eps: Eps = 1e-5
    global_attn_every_n_layers: Count = 3
    layer_types: list[str] | None = None
    local_attention: Rows = 128
    global_rope_theta: Theta = 160_000.0
    local_rope_theta: Theta | None = 10_000.0
    rope_parameters: dict[str, dict[str, Any]] | None = None
    hidden_activation: str = "gelu"
    norm_bias: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False


def read_config(config: Mapping[str, object]) -> ModernBertConfig:
    """The encoder that `config.json` describes. Raises `ValueError`, also msgspec's own."""
    found = msgspec.convert(config, _ModernBertFile)
    if found.hidden_activation != "gelu":
        raise ValueError(f"hidden_activation is {found.hidden_activation!r}; understood is 'gelu'")
    if found.hidden_size % (2 * found.num_attention_heads):
        raise ValueError(
            f"hidden_size {found.hidden_size} is no even multiple of num_attention_heads "
            f"{found.num_attention_heads}"
        )
    every = found.global_attn_every_n_layers
    types = found.layer_types or [
        FULL if i % every == 0 else SLIDING for i in range(found.num_hidden_layers)
    ]
    if len(types) != found.num_hidden_layers or not {*types} <= {FULL, SLIDING}:
        raise ValueError(f"layer_types is {types!r}; understood are {FULL} and {SLIDING}")
    return ModernBertConfig(
        **found.common(),
        norm_eps=found.norm_eps,
        layer_types=tuple(types),
        sliding_window=found.local_attention // 2,
        rope_thetas=_thetas(found),
        norm_bias=found.norm_bias,
        attention_bias=found.attention_bias,
        mlp_bias=found.mlp_bias,
    )


def _thetas(found: _ModernBertFile) -> tuple[float, float]:
    """Of full layers and of sliding ones, as transformers 4 and 5 write them."""
    full, local = found.global_rope_theta, found.local_rope_theta or found.global_rope_theta
    given = found.rope_parameters or {}
    if any(one.get("rope_type", "default") != "default" for one in given.values()):
        raise ValueError("its rotary positions are scaled, which is not understood")
    full = msgspec.convert(given.get(FULL, {}).get("rope_theta", full), Theta)
    local = msgspec.convert(given.get(SLIDING, {}).get("rope_theta", local), Theta)
    return full, local


def head_plan(
    architecture: str, file: Mapping[str, Any], config: ModernBertConfig
) -> HeadPlan | None:
    """The head of a class of transformers, whose `config.json` is *file*; None for another class.

    Raises `ValueError` for what is not understood, also msgspec's own.
    """
    if not architecture.endswith(("ForSequenceClassification", "ForMaskedLM")):
        return None
    if (activation := file.get("classifier_activation", "gelu")) != "gelu":
        raise ValueError(f"classifier_activation is {activation!r}; understood is 'gelu'")
    bias = "head.dense.bias" if file.get("classifier_bias") else None
    norm_bias = "head.norm.bias" if config.norm_bias else None
    head = (
        LinearName("head.dense.weight", bias, Nonlinearity.GELU),
        NormName("head.norm.weight", norm_bias, config.norm_eps),
    )
    if architecture.endswith("ForSequenceClassification"):
        pooling = Pooling(file.get("classifier_pooling", "cls"))
        return HeadPlan(Output.SCORE, (pooling,), (*head, LinearName.of("classifier")))
    is_tied = file.get("tie_word_embeddings") is not False
    decoder_bias = "decoder.bias" if file.get("decoder_bias", True) else None
    decoder = LinearName(KEY_TENSOR if is_tied else "decoder.weight", decoder_bias)
    return HeadPlan(Output.SPARSE, (), (*head, decoder))


def forward(ops: Ops[T], config: ModernBertConfig) -> T:
    """Last hidden states `[tokens, hidden_size]` of the tokens that are kept."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    specs = {
        kind: AttentionSpec(
            heads,
            hidden // heads,
            heads,
            rope=Rope(theta, config.max_position_embeddings),
            window=window,
        )
        for kind, theta, window in zip(
            (FULL, SLIDING), config.rope_thetas, (None, config.sliding_window), strict=True
        )
    }
    eps, bias = config.norm_eps, config.norm_bias
    x = ops.embed(Table("embeddings.tok_embeddings", config.vocab_size, hidden), Index.ID)
    x = ops.layer_norm(x, "embeddings.norm", eps=eps, bias=bias)
    for i, kind in enumerate(config.layer_types):
        layer = f"layers.{i}"
        normed = ops.layer_norm(x, f"{layer}.attn_norm", eps=eps, bias=bias) if i else x
        names = (f"{layer}.{name}" for name in FUSED["attn.Wqkv"])
        q, k, v = ops.linear(
            normed, *(Linear(name, hidden, config.attention_bias) for name in names)
        )
        attended = ops.attention(q, k, v, specs[kind])
        if i == config.num_hidden_layers - 1:
            x, attended = ops.keep(x), ops.keep(attended)
        x = ops.block(after_attention, layer, config, x, attended)
    return ops.layer_norm(x, "final_norm", eps=eps, bias=bias)


def after_attention(ops: Ops[T], config: ModernBertConfig, x: T, attended: T) -> T:
    """The rest of a layer: projection and feed-forward network, each added to the residual."""
    hidden, inner = config.hidden_size, config.intermediate_size
    x = ops.add(x, ops.linear(attended, Linear("attn.Wo", hidden, config.attention_bias))[0])
    normed = ops.layer_norm(x, "mlp_norm", eps=config.norm_eps, bias=config.norm_bias)
    gate, up = (Linear(name, inner, config.mlp_bias) for name in FUSED["mlp.Wi"])
    down = Linear("mlp.Wo", hidden, config.mlp_bias)
    return ops.add(x, ops.gated_mlp(normed, gate, up, down, Activation.GELU))
