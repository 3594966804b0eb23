"""Layout of a model's folder: which files it may hold, and what the small ones say of the model.

Strict, because a setting that is passed over makes wrong vectors without a sound: a part that
would change the result and is not understood is refused, with the reason and a next step.
"""

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np

from trivec.checkpoints.tensor_files import open_tensor_file
from trivec.core.errors import CheckpointRefused
from trivec.core.types import Float32Array
from trivec.models import registry
from trivec.models.ops import ModelConfig
from trivec.models.pooling import Heads, Pooling

T = TypeVar("T")

FILES_MAX = 10_000  # in a folder
JSON_BYTES_MAX = 1024 * 1024
TOKENIZER_BYTES_MAX = 256 * 1024 * 1024
TOKENS_MAX = 4_000_000  # a larger maximum is transformers' way to say that there is none

TOKENIZER_FILE = "tokenizer.json"
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")  # the first one there is read
HEADS = ("sparse_linear", "colbert_linear")  # files of BGE-M3's heads, .safetensors or .pt
POOLING_FILE = "1_Pooling/config.json"
LAYOUT_FILES = (
    "config.json",
    "modules.json",
    POOLING_FILE,
    "2_Normalize/config.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
)
# Settings of sentence-transformers' files, and the values of an ordinary text encoder, which change
# no vector here; `...`: any value. Others are refused, for the reason given or as not understood.
ORDINARY_MODEL: Mapping[str, object] = {
    "__version__": ...,
    "prompts": ...,  # named here, put before a text by whoever sends it
    "similarity_fn_name": ...,
    "model_type": (None, "SentenceTransformer"),
    "default_prompt_name": (None, ""),
}
ORDINARY_TRANSFORMER: Mapping[str, object] = {
    "max_seq_length": ...,
    "unpad_inputs": ...,  # how a batch is laid out in memory
    "do_lower_case": (False,),
    "transformer_task": ("feature-extraction",),
    "modality_config": (
        {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
    ),
    "module_output_name": ("token_embeddings",),
    "query_length": (None,),
    "document_length": (None,),
    "query_expansion": (None,),
}
# Of token vectors it would come before the pooling.
ORDINARY_NORMALIZE = dict.fromkeys(
    ("module_input_name", "module_output_name"), ("sentence_embedding",)
)
REASONS = {
    "default_prompt_name": "puts a prompt before every text. Set it to null and let the client "
    "send the prompt with its text.",
    "truncate_dim": "keeps only the first numbers of each vector, which is not done here. Remove "
    "it to serve whole vectors, and cut them where they are used.",
    "include_prompt": "leaves a prompt's tokens out of the vector; here a text is pooled whole, "
    "its prompt with it.",
    "embedding_dimension": "is not the width of the encoder's vectors.",
    "word_embedding_dimension": "is not the width of the encoder's vectors.",
}
POOLING_MODES = {  # flags that older sentence-transformers write, and what newer ones call them
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
# What never is a lexical weight, with the names XLM-R's tokenizer gives by default.
IGNORED_TOKENS = {
    "cls_token": "<s>",
    "eos_token": "</s>",
    "pad_token": "<pad>",
    "unk_token": "<unk>",
}
# Settings of transformers that override a BERT normalizer: its own name and default of each.
NORMALIZER_SETTINGS: Mapping[str, tuple[str, bool | None]] = {
    "do_lower_case": ("lowercase", True),
    "strip_accents": ("strip_accents", None),
    "tokenize_chinese_chars": ("handle_chinese_chars", True),
}


class _Module(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    type: str
    path: str
    idx: int = 0
    name: str = ""


class _AddedToken(msgspec.Struct, frozen=True):
    content: str
    id: int = -1


class _TokenizerFile(msgspec.Struct, frozen=True):
    """The only parts of `tokenizer.json` that are read here; the rest is skipped, not built."""

    normalizer: dict[str, Any] | None = None
    added_tokens: list[_AddedToken] = []


@dataclass(frozen=True, slots=True)
class SentenceSettings:
    """What sentence-transformers' files say: how hidden states become a vector, how many are read."""

    pooling: Pooling
    normalize: bool
    token_count_max: int | None  # None: as many as the positions allow


def scan(folder: Path) -> frozenset[str]:
    """Names of all files under *folder*, with `/` between parts; none of them is opened.

    Raises `CheckpointRefused` for a link that leads out of the folder (of the model's own part of
    a hub cache, where *folder* is a snapshot in one), for Python code, for more than FILES_MAX
    files, and for anything that is neither a file nor a folder.
    """
    snapshots = folder.parent
    is_cached = snapshots.name == "snapshots" and snapshots.parent.name.startswith("models--")
    link_root = snapshots.parent if is_cached else folder

    def refuse_unreadable(error: OSError) -> None:
        raise CheckpointRefused(f"{error.filename}: cannot be read: {error}") from error

    names: set[str] = set()
    # Links to folders are listed but not entered.
    for parent, folders, files in os.walk(folder, onerror=refuse_unreadable):
        for entry in (Path(parent, name) for name in sorted(folders + files)):
            if len(names) >= FILES_MAX:
                problem = f"is one of more than {FILES_MAX:,} files; this is no model's folder"
            elif entry.is_symlink() and not entry.resolve().is_relative_to(link_root):
                problem = f"is a link that leads out of {link_root}. Put the file itself there."
            elif entry.is_dir():
                continue
            elif not entry.is_file():
                problem = "is not an ordinary file. Remove it."
            elif entry.suffix in (".py", ".pyc", ".so"):
                problem = "is code, and none is ever run. If the model works without it, remove it."
            else:
                names.add(entry.relative_to(folder).as_posix())
                continue
            raise CheckpointRefused(f"{entry}: {problem}")
    return frozenset(names)


def read_json(file: Path, kind: type[T], *, bytes_max: int = JSON_BYTES_MAX) -> T:
    """The JSON in *file* as a *kind*. Raises `CheckpointRefused`, naming the field at fault."""
    try:
        with file.open("rb") as opened:
            content = opened.read(bytes_max + 1)
        if len(content) > bytes_max:
            raise CheckpointRefused(f"{file}: larger than {bytes_max:,} bytes")
        return msgspec.json.decode(content, type=kind)
    except (OSError, RecursionError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise CheckpointRefused(f"{file}: not understood: {error}") from error


def model_files(names: frozenset[str], *, known: Collection[str] = ()) -> list[str]:
    """The files among *names* that a model is made of: small ones, weights, then heads.

    Of several weight files the first *known* one is taken. Raises `ValueError` saying what lacks.
    """
    if "config.json" not in names:
        raise ValueError("holds no config.json, so it is no model's folder")
    if TOKENIZER_FILE not in names:
        raise ValueError(f"holds no {TOKENIZER_FILE}; save the model's fast tokenizer there")
    weights = [name for name in WEIGHT_FILES if name in names]
    if not weights:
        raise ValueError(f"holds none of {', '.join(WEIGHT_FILES)}")
    weights.sort(key=lambda name: name not in known)
    heads = {
        head: head + suffix
        for head in HEADS
        for suffix in (".pt", ".safetensors")  # the second where both are there
        if head + suffix in names
    }
    if len(heads) == 1:
        (lacking,) = {*HEADS} - {*heads}
        (found,) = heads.values()
        raise ValueError(f"holds {found} but no {lacking}.pt; copy both heads, or neither")
    layout = [name for name in LAYOUT_FILES if name in names]
    return [*layout, TOKENIZER_FILE, weights[0], *heads.values()]


def read_config(folder: Path) -> ModelConfig:
    """The model that `config.json` of *folder* describes. Raises `CheckpointRefused`."""
    file = folder / "config.json"
    try:
        return registry.read_config(read_json(file, dict[str, Any]))
    except (ValueError, msgspec.ValidationError) as error:
        raise CheckpointRefused(f"{file}: {error}") from error


def read_sentence_settings(
    folder: Path, names: frozenset[str], *, hidden_size: int
) -> SentenceSettings:
    """What `modules.json` and the files it leads to say. Raises `CheckpointRefused`.

    *names* are the folder's files as `scan` lists them; `modules.json` must be among them.
    """
    file = folder / "modules.json"
    modules = read_json(file, list[_Module])
    for module in modules:
        if module.type.partition(".")[0] != "sentence_transformers":
            raise CheckpointRefused(
                f"{file}: module type {module.type!r} is code of the model's own; none is run"
            )
    kinds = [module.type.rpartition(".")[2] for module in modules]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise CheckpointRefused(
            f"{file}: names the modules {', '.join(kinds) or 'none'}; understood are Transformer, "
            "Pooling and an optional Normalize, in this order"
        )
    if modules[0].path != "" or modules[1].path != "1_Pooling":
        raise CheckpointRefused(
            f"{file}: keeps its modules in {modules[0].path or '.'} and {modules[1].path}; "
            "understood are the folder itself and 1_Pooling"
        )
    if POOLING_FILE not in names:
        raise CheckpointRefused(f"{folder / POOLING_FILE}: is missing; copy the whole model")
    width = (None, hidden_size)
    pooling = _read_settings(
        folder / POOLING_FILE,
        {"include_prompt": (True,), "embedding_dimension": width, "word_embedding_dimension": width}
        | dict.fromkeys((*POOLING_MODES, "pooling_mode"), ...),
    )
    named = pooling.get("pooling_mode") or []
    flags = [mode for name, mode in POOLING_MODES.items() if pooling.get(name)]
    modes = dict.fromkeys([*flags, *map(str, named if isinstance(named, list) else [named])])
    if [*modes] not in (["cls"], ["mean"], ["lasttoken"]):
        raise CheckpointRefused(
            f"{folder / POOLING_FILE}: asks for {' and '.join(modes) or 'no'} pooling; understood "
            "is exactly one of cls, mean and lasttoken"
        )
    file = folder / "config_sentence_transformers.json"
    if file.name in names:
        _read_settings(file, {**ORDINARY_MODEL, "truncate_dim": width})
    if len(kinds) == 3 and (name := f"{modules[2].path}/config.json") in names:
        _read_settings(folder / name, ORDINARY_NORMALIZE)
    file, length = folder / "sentence_bert_config.json", None
    if file.name in names:
        length = _read_settings(file, ORDINARY_TRANSFORMER).get("max_seq_length")
    return SentenceSettings(
        pooling=Pooling(*modes),
        normalize=len(kinds) == 3,
        token_count_max=_token_count(file, "max_seq_length", length),
    )


def _read_settings(file: Path, ordinary: Mapping[str, object]) -> dict[str, Any]:
    """The settings in *file*. Raises `CheckpointRefused` for one that is not as *ordinary*."""
    found = read_json(file, dict[str, Any])
    for name, value in found.items():
        values = ordinary.get(name, ())
        if isinstance(values, tuple) and value not in values:
            reason = REASONS.get(name, "is not understood")
            raise CheckpointRefused(f"{file}: {name} = {value!r} {reason}")
    return found


def read_tokenizer_length(folder: Path, names: frozenset[str]) -> int | None:
    """The tokenizer's own `model_max_length`, or None where it has none. Raises `CheckpointRefused`.

    It is the only place where sentence-transformers 5.4 and later keep a model's maximum length.
    In transformers other settings of this file override a BERT tokenizer's normalizer; here what
    would override it is refused.
    """
    if "tokenizer_config.json" not in names:
        return None
    file = folder / "tokenizer_config.json"
    found = read_json(file, dict[str, Any])
    settings = [name for name in NORMALIZER_SETTINGS if name in found]
    normalizer = _read_tokenizer(folder).normalizer if settings else None
    if normalizer is not None and normalizer.get("type") == "BertNormalizer":
        for name in settings:
            own_name, default = NORMALIZER_SETTINGS[name]
            own = normalizer.get(own_name, default)
            if found[name] != own:
                raise CheckpointRefused(
                    f"{file}: {name} = {found[name]!r}, but {TOKENIZER_FILE} has {own_name} = "
                    f"{own!r}. Save the tokenizer again, so that both say the same."
                )
    return _token_count(file, "model_max_length", found.get("model_max_length"))


def _token_count(file: Path, name: str, value: object) -> int | None:
    """A maximum length as configs write it; None where it is null or beyond any model's."""
    if value is None or (isinstance(value, int | float) and value > TOKENS_MAX):
        return None
    if type(value) is not int or value < 1:
        raise CheckpointRefused(f"{file}: {name} = {value!r} is not a count of tokens")
    return value


def _read_tokenizer(folder: Path) -> _TokenizerFile:
    return read_json(folder / TOKENIZER_FILE, _TokenizerFile, bytes_max=TOKENIZER_BYTES_MAX)


def read_heads(folder: Path, files: list[str], *, hidden_size: int) -> Heads:
    """Both heads, widened to float32. *files*: sparse, then multi. Raises `CheckpointRefused`."""
    sparse_weight, sparse_bias = _read_linear(folder / files[0], hidden_size)
    multi_weight, multi_bias = _read_linear(folder / files[1], hidden_size)
    if len(sparse_bias) != 1:
        raise CheckpointRefused(
            f"{folder / files[0]}: has {len(sparse_bias)} outputs; a lexical weight is one number"
        )
    return Heads(sparse_weight, sparse_bias, multi_weight, multi_bias, _ignored_token_ids(folder))


def _read_linear(file: Path, hidden_size: int) -> tuple[Float32Array, Float32Array]:
    """Weight `[out, hidden]` and bias `[out]`, in memory of their own."""
    opened = open_tensor_file(file)
    if set(opened.tensors) != {"weight", "bias"}:
        raise CheckpointRefused(
            f"{file}: holds {', '.join(sorted(opened.tensors)[:4]) or 'nothing'}; a head is "
            "weight and bias"
        )
    weight, bias = opened.float32("weight"), opened.float32("bias")
    if weight.ndim != 2 or bias.ndim != 1 or weight.shape != (len(bias), hidden_size):
        raise CheckpointRefused(
            f"{file}: weight has shape {list(weight.shape)} and bias {list(bias.shape)}; expected "
            f"are [outputs, {hidden_size}] and [outputs]"
        )
    return np.array(weight), np.array(bias)


def _ignored_token_ids(folder: Path) -> tuple[int, ...]:
    """Ids of the special tokens, by the names that the tokenizer's small files give them."""
    tokens = dict(IGNORED_TOKENS)
    for file in (folder / "tokenizer_config.json", folder / "special_tokens_map.json"):
        found = read_json(file, dict[str, Any]) if file.is_file() else {}
        for name in IGNORED_TOKENS:
            # BERT's files call the closing token sep, and may have no eos.
            written = found.get(name) or (found.get("sep_token") if name == "eos_token" else None)
            if written is not None:
                content = written.get("content") if isinstance(written, dict) else written
                tokens[name] = str(content)
    added = {token.content: token.id for token in _read_tokenizer(folder).added_tokens}
    for name, content in tokens.items():
        if content not in added:
            raise CheckpointRefused(
                f"{folder / TOKENIZER_FILE}: its {name} {content!r} is no added token, so it "
                "cannot be kept out of sparse vectors"
            )
    return tuple(sorted({added[content] for content in tokens.values()}))
