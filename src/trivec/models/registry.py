"""Registry: from a config's `model_type` to the family that describes the model."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from trivec.core.types import Output
from trivec.models import (
    bert,
    distilbert,
    gemma3,
    gte,
    jina_bert,
    modernbert,
    mpnet,
    nomic_bert,
    qwen3,
    static,
)
from trivec.models.ops import ModelConfig, Ops, Plan, Recorder, T
from trivec.models.pooling import HeadPlan, LinearName, Pooling


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What one family's file offers."""

    read_config: Callable[[Mapping[str, object]], ModelConfig]
    forward: Callable[[Any, Any], Any]  # (ops, config) to the last hidden states
    prefixes: tuple[str, ...]  # what may stand before the tensors' names in a file
    key_tensor: str  # a tensor that every model of the family has
    unused: tuple[str, ...]  # patterns of tensors that files carry and nobody reads
    # Matrices of a file that hold several layers, and whose rows are whose: names within a block.
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    renamed: tuple[tuple[str, str], ...] = ()  # parts of names: as files have them, as here
    # How the names begin of classes in `auto_map` whose code this family stands for.
    stands_for: tuple[str, ...] = ()
    transposed: tuple[str, ...] = ()  # ends of names of matrices that files keep as [in, out]
    # (architecture, config.json, config) to the head of a classifier or masked language model.
    head_plan: Callable[[str, Mapping[str, Any], Any], HeadPlan | None] = lambda *_: None
    pooling: Pooling = Pooling.MEAN  # where a folder does not say

    def own_name(self, name: str) -> str:
        """What this family calls the tensor *name* of a file."""
        for theirs, ours in self.renamed:
            name = name.replace(theirs, ours)
        return name


BERT = Family(
    read_config=bert.read_config,
    forward=bert.forward,
    prefixes=bert.PREFIXES,
    key_tensor=bert.KEY_TENSOR,
    unused=bert.UNUSED,
    head_plan=bert.head_plan,
)
DISTILBERT = Family(
    read_config=distilbert.read_config,
    forward=bert.forward,
    prefixes=distilbert.PREFIXES,
    key_tensor=bert.KEY_TENSOR,
    unused=distilbert.UNUSED,
    renamed=distilbert.RENAMED,
    head_plan=distilbert.head_plan,
)
MPNET = Family(
    read_config=mpnet.read_config,
    forward=bert.forward,
    prefixes=mpnet.PREFIXES,
    key_tensor=bert.KEY_TENSOR,
    unused=mpnet.UNUSED,
    renamed=mpnet.RENAMED,
    head_plan=bert.head_plan,
)
MODERN_BERT = Family(
    read_config=modernbert.read_config,
    forward=modernbert.forward,
    prefixes=modernbert.PREFIXES,
    key_tensor=modernbert.KEY_TENSOR,
    unused=modernbert.UNUSED,
    fused=modernbert.FUSED,
    head_plan=modernbert.head_plan,
)
QWEN3 = Family(
    read_config=qwen3.read_config,
    forward=qwen3.forward,
    prefixes=qwen3.PREFIXES,
    key_tensor=qwen3.KEY_TENSOR,
    unused=qwen3.UNUSED,
    stands_for=qwen3.STANDS_FOR,
    head_plan=qwen3.head_plan,
    pooling=Pooling.LAST,
)
NOMIC_BERT = Family(
    read_config=nomic_bert.read_config,
    forward=nomic_bert.forward,
    prefixes=nomic_bert.PREFIXES,
    key_tensor=nomic_bert.KEY_TENSOR,
    unused=nomic_bert.UNUSED,
    fused=nomic_bert.FUSED,
    renamed=nomic_bert.RENAMED,
    stands_for=nomic_bert.STANDS_FOR,
    transposed=nomic_bert.TRANSPOSED,
    head_plan=nomic_bert.head_plan,
)
GTE = Family(
    read_config=gte.read_config,
    forward=nomic_bert.forward,
    prefixes=gte.PREFIXES,
    key_tensor=nomic_bert.KEY_TENSOR,
    unused=gte.UNUSED,
    fused=gte.FUSED,
    renamed=gte.RENAMED,
    stands_for=gte.STANDS_FOR,
    head_plan=nomic_bert.head_plan,
    pooling=Pooling.CLS,
)
JINA_BERT = Family(
    read_config=jina_bert.read_config,
    forward=nomic_bert.forward,
    prefixes=jina_bert.PREFIXES,
    key_tensor=nomic_bert.KEY_TENSOR,
    unused=jina_bert.UNUSED,
    fused=jina_bert.FUSED,
    renamed=jina_bert.RENAMED,
    stands_for=jina_bert.STANDS_FOR,
    head_plan=nomic_bert.head_plan,
)
GEMMA3 = Family(
    read_config=gemma3.read_config,
    forward=gemma3.forward,
    prefixes=gemma3.PREFIXES,
    key_tensor=gemma3.KEY_TENSOR,
    unused=gemma3.UNUSED,
)
STATIC = Family(
    read_config=static.read_config,
    forward=static.forward,
    prefixes=("",),
    key_tensor=static.KEY_TENSOR,
    unused=(),
)
FAMILIES: Mapping[str, Family] = {
    **dict.fromkeys(bert.MODEL_TYPES, BERT),
    **dict.fromkeys(distilbert.MODEL_TYPES, DISTILBERT),
    **dict.fromkeys(mpnet.MODEL_TYPES, MPNET),
    **dict.fromkeys(modernbert.MODEL_TYPES, MODERN_BERT),
    **dict.fromkeys(nomic_bert.MODEL_TYPES, NOMIC_BERT),
    **dict.fromkeys(gte.MODEL_TYPES, GTE),
    jina_bert.FAMILY_NAME: JINA_BERT,
    **dict.fromkeys(gemma3.MODEL_TYPES, GEMMA3),
    **dict.fromkeys(qwen3.MODEL_TYPES, QWEN3),
    **dict.fromkeys(static.MODEL_TYPES, STATIC),
}


def read_config(config: Mapping[str, object]) -> ModelConfig:
    """The model that the content of `config.json` describes. Raises `ValueError` with the reason."""
    model_type = config.get("model_type")
    if model_type == "bert" and config.get("position_embedding_type") == "alibi":
        model_type = jina_bert.FAMILY_NAME
    if model_type == "jina_embeddings_v3" or config.get("lora_adaptations"):
        raise ValueError(
            "it is jina-embeddings v3, which keeps an adapter for each task beside its weights, and "
            "none is merged here. Take jina-embeddings v2, or another multilingual model"
        )
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(
            f"model_type is {model_type!r}; served are models of the families {', '.join(FAMILIES)}"
        )
    family = FAMILIES[model_type]
    is_known = _is_known_code(config.get("auto_map"), family)
    if not is_known or config.get("trust_remote_code") is not None:
        raise ValueError(
            "auto_map or trust_remote_code asks to run code from the model's folder; none is"
        )
    if config.get("quantization_config") is not None:
        raise ValueError(
            "quantization_config is set; give the float checkpoint, it is quantised at load"
        )
    found = family.read_config(config)
    if found.token_count_max < 1:
        raise ValueError("max_position_embeddings leaves no position for a token")
    return found


def _is_known_code(auto_map: object, family: Family) -> bool:
    """Whether *auto_map* names no class but those whose code the family stands for."""
    targets = auto_map.values() if isinstance(auto_map, dict) else [auto_map]
    names = [str(target).rpartition(".")[2] for target in targets if target is not None]
    return all(name.startswith(family.stands_for) for name in names)


def head_plan(file: Mapping[str, Any], config: ModelConfig) -> HeadPlan | None:
    """The head of the class that `config.json`, *file*, names; None for a bare encoder.

    Raises `ValueError` with the reason for a head that is not understood.
    """
    architectures = file.get("architectures") or [""]
    if architectures[0] == "HF_ColBERT":  # Stanford's code, over any encoder
        return HeadPlan(Output.MULTI, (), (LinearName("linear.weight", None),))
    return FAMILIES[config.family].head_plan(str(architectures[0]), file, config)


def forward(ops: Ops[T], config: ModelConfig) -> T:
    """Last hidden states `[kept tokens, hidden_size]` of the model *config*, by *ops*."""
    hidden: T = FAMILIES[config.family].forward(ops, config)
    return hidden


@lru_cache(maxsize=16)
def plan_of(config: ModelConfig) -> Plan:
    """Every tensor that the model reads, and how its linear layers hang together."""
    plan = Plan()
    forward(Recorder(plan), config)
    return plan


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Canonical name to shape of every tensor of the model; linear weights are `[out, in]`."""
    return plan_of(config).shapes
