"""The sentence-transformers layout: what a folder's small JSON files say of its model.

Strict, because a setting that is passed over makes wrong vectors without a sound: a part that
would change the result and is not understood is refused, with the reason and a next step.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from trivec.checkpoints.folder import read_json
from trivec.core.errors import CheckpointRefused
from trivec.models import registry
from trivec.models.ops import ModelConfig
from trivec.models.pooling import Pooling

POOLING_FILE = "1_Pooling/config.json"
NORMALIZE_FILE = "2_Normalize/config.json"
LAYOUT_FILES = (
    "config.json",
    "modules.json",
    POOLING_FILE,
    NORMALIZE_FILE,
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
    "query_length": None,
    "document_length": None,
    "query_expansion": None,
}
# What 6.x writes for the vectors of a text; others' output is normalised before it is pooled.
NORMALIZE_USUAL = {
    "module_input_name": "sentence_embedding",
    "module_output_name": "sentence_embedding",
}
TOKENS_MAX = 4_000_000  # a larger maximum is transformers' way to say that there is none


class _Module(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    type: str
    path: str
    idx: int = 0
    name: str = ""


class _PoolingFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    word_embedding_dimension: int | None = None
    embedding_dimension: int | None = None
    include_prompt: bool = True
    pooling_mode: str | list[str] | None = None
    pooling_mode_cls_token: bool = False
    pooling_mode_mean_tokens: bool = False
    pooling_mode_max_tokens: bool = False
    pooling_mode_mean_sqrt_len_tokens: bool = False
    pooling_mode_weightedmean_tokens: bool = False
    pooling_mode_lasttoken: bool = False


class _ModelFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`config_sentence_transformers.json`. The first three change no vector of a text as sent."""

    versions: Any = msgspec.field(default=None, name="__version__")
    prompts: Any = None
    similarity_fn_name: Any = None
    model_type: str | None = None
    default_prompt_name: str | None = None
    truncate_dim: int | None = None


class _TokenizerConfigFile(msgspec.Struct, frozen=True):
    """What `tokenizer_config.json` may say otherwise than `tokenizer.json`, which is what runs."""

    model_max_length: Any = None
    do_lower_case: bool | msgspec.UnsetType = msgspec.UNSET
    strip_accents: bool | msgspec.UnsetType | None = msgspec.UNSET
    tokenize_chinese_chars: bool | msgspec.UnsetType = msgspec.UNSET


class _Normalizer(msgspec.Struct, frozen=True):
    type: str
    lowercase: bool = True
    strip_accents: bool | None = None
    handle_chinese_chars: bool = True


class _TokenizerFile(msgspec.Struct, frozen=True):
    """The only part of `tokenizer.json` that is read here; the rest is skipped, not built."""

    normalizer: _Normalizer | None = None


@dataclass(frozen=True, slots=True)
class Recipe:
    """From last hidden states to a dense vector, and how many tokens are read."""

    pooling: Pooling
    normalize: bool
    token_count_max: int | None  # None: as many as the tokenizer and the positions allow


def read_config(folder: Path) -> ModelConfig:
    """The model that `config.json` of *folder* describes. Raises `CheckpointRefused`."""
    file = folder / "config.json"
    try:
        return registry.read_config(read_json(file, dict[str, Any]))
    except msgspec.ValidationError as error:
        raise CheckpointRefused(f"{file}: not understood: {error}") from error
    except ValueError as error:
        raise CheckpointRefused(f"{file}: {error}") from error


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
    _refuse_model_settings(folder, names, hidden_size=hidden_size)
    if len(kinds) == 3:
        _refuse_other_normalize(folder, f"{modules[2].path}/config.json", names)
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
    if not found.include_prompt:
        raise CheckpointRefused(
            f"{file}: include_prompt = false leaves a prompt's tokens out of the vector; here a "
            "text is pooled whole, its prompt with it"
        )
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
    named = found.pooling_mode or []
    modes += [mode for mode in ([named] if isinstance(named, str) else named) if mode not in modes]
    if modes not in (["cls"], ["mean"], ["lasttoken"]):
        raise CheckpointRefused(
            f"{file}: asks for {' and '.join(modes) or 'no'} pooling; understood is exactly one "
            "of cls, mean and lasttoken"
        )
    return Pooling(modes[0])


def _read_length(folder: Path, names: frozenset[str]) -> int | None:
    if "sentence_bert_config.json" not in names:
        return None
    file = folder / "sentence_bert_config.json"
    found = read_json(file, dict[str, Any])
    length = found.pop("max_seq_length", None)
    found.pop("unpad_inputs", None)  # how a batch is laid out in memory
    for name, setting in found.items():
        if SENTENCE_CONFIG_USUAL.get(name, ...) != setting:
            raise CheckpointRefused(f"{file}: {name} = {setting!r} is not understood")
    return _token_count(file, "max_seq_length", length)


def read_tokenizer_length(folder: Path, names: frozenset[str]) -> int | None:
    """The tokenizer's own `model_max_length`, or None where it has none. Raises `CheckpointRefused`.

    It is the only place where sentence-transformers 5.4 and later keep a model's maximum length.
    """
    if "tokenizer_config.json" not in names:
        return None
    file = folder / "tokenizer_config.json"
    found = read_json(file, _TokenizerConfigFile)
    _refuse_other_normalizer(file, found)
    return _token_count(file, "model_max_length", found.model_max_length)


def _token_count(file: Path, name: str, value: object) -> int | None:
    """A maximum length as configs write it; None where it is null or beyond any model's."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if value is None or (is_number and value > TOKENS_MAX):  # type: ignore[operator]
        return None
    if not isinstance(value, int) or not is_number or value < 1:
        raise CheckpointRefused(f"{file}: {name} = {value!r} is not a count of tokens")
    return value


def _refuse_other_normalizer(file: Path, said: _TokenizerConfigFile) -> None:
    """In transformers these settings override a BERT tokenizer's normalizer; here it stays."""
    tokenizer_file = file.parent / "tokenizer.json"
    pairs = {
        "do_lower_case": (said.do_lower_case, "lowercase"),
        "strip_accents": (said.strip_accents, "strip_accents"),
        "tokenize_chinese_chars": (said.tokenize_chinese_chars, "handle_chinese_chars"),
    }
    if all(value is msgspec.UNSET for value, _ in pairs.values()):
        return
    try:
        normalizer = msgspec.json.decode(
            tokenizer_file.read_bytes(), type=_TokenizerFile
        ).normalizer
    except (OSError, RecursionError, msgspec.MsgspecError) as error:
        raise CheckpointRefused(f"{tokenizer_file}: not understood: {error}") from error
    if normalizer is None or normalizer.type != "BertNormalizer":
        return
    for name, (value, other_name) in pairs.items():
        other = getattr(normalizer, other_name)
        if value is not msgspec.UNSET and value != other:
            raise CheckpointRefused(
                f"{file}: {name} = {value!r}, but {tokenizer_file.name} has {other_name} = "
                f"{other!r}. Save the tokenizer again, so that both say the same."
            )


def _refuse_other_normalize(folder: Path, name: str, names: frozenset[str]) -> None:
    if name in names and (found := read_json(folder / name, dict[str, Any])) != NORMALIZE_USUAL:
        raise CheckpointRefused(
            f"{folder / name}: {found!r} is not understood; normalised is the sentence_embedding"
        )


def _refuse_model_settings(folder: Path, names: frozenset[str], *, hidden_size: int) -> None:
    """Refuse what `config_sentence_transformers.json` would do to a text or its vector."""
    if "config_sentence_transformers.json" not in names:
        return
    file = folder / "config_sentence_transformers.json"
    found = read_json(file, _ModelFile)
    if found.default_prompt_name:
        raise CheckpointRefused(
            f"{file}: default_prompt_name = {found.default_prompt_name!r} puts a prompt before "
            "every text. Set it to null and let the client send the prompt with its text."
        )
    if found.truncate_dim is not None and found.truncate_dim < hidden_size:
        raise CheckpointRefused(
            f"{file}: truncate_dim = {found.truncate_dim} keeps only the first numbers of each "
            f"vector, which is not done here. Remove it to serve whole vectors of {hidden_size} "
            "numbers, and cut them where they are used."
        )
    if found.model_type not in (None, "SentenceTransformer"):
        raise CheckpointRefused(
            f"{file}: model_type is {found.model_type!r}; understood is 'SentenceTransformer'"
        )
