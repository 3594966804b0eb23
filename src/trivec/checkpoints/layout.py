"""The sentence-transformers layout: what a folder's small JSON files say of its model.

Strict, because a setting that is passed over makes wrong vectors without a sound: a part that
would change the result and is not understood is refused, with the reason and a next step.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from trivec.checkpoints.encoder import EncoderConfig, Pooling
from trivec.checkpoints.folder import read_json
from trivec.core.errors import CheckpointRefused

FAMILIES = ("bert", "roberta", "xlm-roberta")
POOLING_FILE = "1_Pooling/config.json"
LAYOUT_FILES = (
    "config.json",
    "modules.json",
    POOLING_FILE,
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
)
# What sentence-transformers 5 writes beside the length for an ordinary text encoder.
SENTENCE_CONFIG_USUAL: dict[str, object] = {
    "do_lower_case": False,
    "transformer_task": "feature-extraction",
    "modality_config": {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
    "module_output_name": "token_embeddings",
}

# Bounds that keep a lying config from asking for absurd amounts of memory.
Count = Annotated[int, Meta(ge=1, le=4096)]
Width = Annotated[int, Meta(ge=1, le=65_536)]
Rows = Annotated[int, Meta(ge=1, le=4_000_000)]


class _ConfigFile(msgspec.Struct, frozen=True):
    """`config.json`; what it leaves out has the default of transformers' own BertConfig."""

    model_type: str
    hidden_size: Width
    num_hidden_layers: Count
    num_attention_heads: Count
    intermediate_size: Width
    vocab_size: Rows
    max_position_embeddings: Rows
    layer_norm_eps: Annotated[float, Meta(gt=0, lt=1)] = 1e-12
    type_vocab_size: Count = 2
    pad_token_id: Annotated[int, Meta(ge=0)] | None = None
    hidden_act: str = "gelu"
    position_embedding_type: str | None = "absolute"
    is_decoder: bool = False
    add_cross_attention: bool = False
    auto_map: Any = None
    trust_remote_code: Any = None
    quantization_config: Any = None
    pruned_heads: dict[str, Any] | None = None


class _Module(msgspec.Struct, frozen=True):
    type: str
    path: str
    idx: int = 0
    name: str = ""


class _PoolingFile(msgspec.Struct, frozen=True):
    word_embedding_dimension: int | None = None
    embedding_dimension: int | None = None
    pooling_mode: str | None = None
    pooling_mode_cls_token: bool = False
    pooling_mode_mean_tokens: bool = False
    pooling_mode_max_tokens: bool = False
    pooling_mode_mean_sqrt_len_tokens: bool = False
    pooling_mode_weightedmean_tokens: bool = False
    pooling_mode_lasttoken: bool = False


class _PromptsFile(msgspec.Struct, frozen=True):
    default_prompt_name: str | None = None


@dataclass(frozen=True, slots=True)
class Recipe:
    """From last hidden states to a dense vector, and how many tokens are read."""

    pooling: Pooling
    normalize: bool
    token_count_max: int | None  # None: as many as there are positions


def read_config(folder: Path) -> EncoderConfig:
    """The encoder that `config.json` of *folder* describes. Raises `CheckpointRefused`."""
    file = folder / "config.json"
    found = read_json(file, _ConfigFile)
    if found.model_type not in FAMILIES:
        raise CheckpointRefused(
            f"{file}: model_type is {found.model_type!r}; served are encoders of the families "
            f"{', '.join(FAMILIES)}"
        )
    if reason := _why_not(found):
        raise CheckpointRefused(f"{file}: {reason}")
    is_bert = found.model_type == "bert"
    pad_token_id = found.pad_token_id
    if pad_token_id is None:
        pad_token_id = 0 if is_bert else 1
    config = EncoderConfig(
        family=found.model_type,
        hidden_size=found.hidden_size,
        layer_count=found.num_hidden_layers,
        head_count=found.num_attention_heads,
        intermediate_size=found.intermediate_size,
        layer_norm_eps=found.layer_norm_eps,
        vocabulary_size=found.vocab_size,
        position_count=found.max_position_embeddings,
        position_offset=0 if is_bert else pad_token_id + 1,
        token_type_count=found.type_vocab_size,
        pad_token_id=pad_token_id,
    )
    if config.token_count_max < 1:
        raise CheckpointRefused(f"{file}: max_position_embeddings leaves no position for a token")
    return config


def _why_not(found: _ConfigFile) -> str | None:
    """The first thing in a config that this encoder does not do, or None."""
    if found.auto_map is not None or found.trust_remote_code is not None:
        return "auto_map or trust_remote_code asks to run code from the model's folder; none is"
    if found.hidden_act != "gelu":
        return f"hidden_act is {found.hidden_act!r}; understood is 'gelu'"
    if found.position_embedding_type not in ("absolute", None):
        return (
            f"position_embedding_type is {found.position_embedding_type!r}; understood is "
            "'absolute'"
        )
    if found.is_decoder or found.add_cross_attention:
        return "is_decoder or add_cross_attention is set; served are encoders"
    if found.quantization_config is not None:
        return "quantization_config is set; give the float checkpoint, it is quantised at load"
    if found.pruned_heads:
        return "pruned_heads is set; pruned attention is not understood"
    if found.hidden_size % found.num_attention_heads:
        return (
            f"hidden_size {found.hidden_size} is no multiple of num_attention_heads "
            f"{found.num_attention_heads}"
        )
    return None


def read_recipe(folder: Path, names: frozenset[str], *, hidden_size: int) -> Recipe:
    """What `modules.json` and the files it leads to say. Raises `CheckpointRefused`.

    *names* are the folder's files as `survey` lists them; `modules.json` must be among them.
    """
    modules = read_json(folder / "modules.json", list[_Module])
    kinds = [_kind(folder, module) for module in modules]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise CheckpointRefused(
            f"{folder / 'modules.json'}: names the modules {', '.join(kinds) or 'none'}; "
            "understood are Transformer, Pooling and an optional Normalize, in this order"
        )
    if modules[0].path != "" or modules[1].path != "1_Pooling":
        raise CheckpointRefused(
            f"{folder / 'modules.json'}: keeps its modules in {modules[0].path or '.'} and "
            f"{modules[1].path}; understood are the folder itself and 1_Pooling"
        )
    if POOLING_FILE not in names:
        raise CheckpointRefused(f"{folder / POOLING_FILE}: is missing; copy the whole model")
    _refuse_default_prompt(folder, names)
    return Recipe(
        pooling=_read_pooling(folder / POOLING_FILE, hidden_size=hidden_size),
        normalize=len(kinds) == 3,
        token_count_max=_read_length(folder, names),
    )


def _kind(folder: Path, module: _Module) -> str:
    package, _, kind = module.type.partition(".")[0], None, module.type.rpartition(".")[2]
    if package != "sentence_transformers":
        raise CheckpointRefused(
            f"{folder / 'modules.json'}: module type {module.type!r} is code of the model's own; "
            "none is run"
        )
    return kind


def _read_pooling(file: Path, *, hidden_size: int) -> Pooling:
    found = read_json(file, _PoolingFile)
    width = found.word_embedding_dimension or found.embedding_dimension
    if width is not None and width != hidden_size:
        raise CheckpointRefused(
            f"{file}: pools vectors of {width} numbers, the encoder's have {hidden_size}"
        )
    flags = {
        "cls": found.pooling_mode_cls_token,
        "mean": found.pooling_mode_mean_tokens,
        "max": found.pooling_mode_max_tokens,
        "mean_sqrt_len": found.pooling_mode_mean_sqrt_len_tokens,
        "weightedmean": found.pooling_mode_weightedmean_tokens,
        "lasttoken": found.pooling_mode_lasttoken,
    }
    modes = [mode for mode, chosen in flags.items() if chosen]
    if found.pooling_mode is not None and found.pooling_mode not in modes:
        modes.append(found.pooling_mode)
    if modes not in (["cls"], ["mean"]):
        raise CheckpointRefused(
            f"{file}: asks for {' and '.join(modes) or 'no'} pooling; understood is exactly one "
            "of cls and mean"
        )
    return Pooling(modes[0])


def _read_length(folder: Path, names: frozenset[str]) -> int | None:
    if "sentence_bert_config.json" not in names:
        return None
    file = folder / "sentence_bert_config.json"
    found = read_json(file, dict[str, Any])
    length = found.pop("max_seq_length", None)
    for name, setting in found.items():
        if SENTENCE_CONFIG_USUAL.get(name, ...) != setting:
            raise CheckpointRefused(f"{file}: {name} = {setting!r} is not understood")
    if length is not None and (type(length) is not int or not 1 <= length <= 4_000_000):
        raise CheckpointRefused(f"{file}: max_seq_length = {length!r} is not a count of tokens")
    return length


def _refuse_default_prompt(folder: Path, names: frozenset[str]) -> None:
    """A default prompt would go before every text; here a text is embedded as it was sent."""
    if "config_sentence_transformers.json" not in names:
        return
    file = folder / "config_sentence_transformers.json"
    if name := read_json(file, _PromptsFile).default_prompt_name:
        raise CheckpointRefused(
            f"{file}: default_prompt_name = {name!r} puts a prompt before every text. Set it to "
            "null and let the client send the prompt with its text."
        )
