"""Layout of a model's folder: which files it may hold, and what the small ones say of the model.

Strict, because a setting that is passed over makes wrong vectors without a sound: a part that
would change the result and is not understood is refused, with the reason and a next step.
"""

import fnmatch
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from trivec.checkpoints.hashes import HashedFile
from trivec.core.errors import CheckpointRefused
from trivec.models import registry
from trivec.models.ops import ModelConfig
from trivec.models.pooling import HeadPlan

T = TypeVar("T")

FILES_MAX = 10_000  # in a folder
JSON_BYTES_MAX = 1024 * 1024
INDEX_BYTES_MAX = 16 * 1024 * 1024
TOKENIZER_BYTES_MAX = 256 * 1024 * 1024
TOKENS_MAX = 4_000_000  # a larger maximum is transformers' way to say that there is none

TOKENIZER_FILE = "tokenizer.json"
INDEX_FILE = "model.safetensors.index.json"
SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
WEIGHT_FILES = ("model.safetensors", INDEX_FILE, "pytorch_model.bin")  # the first one there is read
STATIC_PART = "0_StaticEmbedding/"  # where sentence-transformers 3 and 4 keep a table and tokenizer
HEADS = ("sparse_linear", "colbert_linear")  # files of BGE-M3's heads, .safetensors or .pt
STATIC_WEIGHT_FILES = tuple(STATIC_PART + name for name in WEIGHT_FILES if name != INDEX_FILE)
COLBERT_FILE = "artifact.metadata"  # of Stanford's ColBERT
LAYOUT_FILES = (
    COLBERT_FILE,
    "config.json",
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
)
# Of the modules that sentence-transformers numbers, as 1_Pooling and 2_Dense.
MODULE_FILE = re.compile(r"\d+_\w+/(config\.json|model\.safetensors|pytorch_model\.bin)", re.ASCII)
# What a folder holds instead of a model's weights, and what to do.
OTHER_FORMATS = {
    "*.gguf": "holds a GGUF file, which is llama.cpp's and quantised its way. Take the model's own "
    "float checkpoint in safetensors.",
    "*.onnx": "holds the model as ONNX only, which is a graph and not weights by name. Take the "
    "model's own checkpoint in safetensors.",
}
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
# Settings of transformers that override a BERT normalizer: its own name and default of each.
NORMALIZER_SETTINGS: Mapping[str, tuple[str, bool | None]] = {
    "do_lower_case": ("lowercase", True),
    "strip_accents": ("strip_accents", None),
    "tokenize_chinese_chars": ("handle_chinese_chars", True),
}


class _AddedToken(msgspec.Struct, frozen=True):
    content: str
    id: int = -1


class _WeightIndex(msgspec.Struct, frozen=True):
    weight_map: dict[str, str]  # tensor to file


class _TokenizerFile(msgspec.Struct, frozen=True):
    """The only parts of `tokenizer.json` that are read here; the rest is skipped, not built."""

    normalizer: dict[str, Any] | None = None
    added_tokens: list[_AddedToken] = []


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
    files = {name.rpartition("/")[2] for name in names}
    weights = [name for name in (*WEIGHT_FILES, *STATIC_WEIGHT_FILES) if name in names]
    is_bare = "config_sentence_transformers.json" in names and "modules.json" in names
    if "adapter_config.json" in names:
        raise ValueError(
            "holds an adapter, not merged into the model that it changes. Merge the two (peft: "
            "merge_and_unload) and save the whole model."
        )
    if not weights:
        for pattern, problem in OTHER_FORMATS.items():
            if fnmatch.filter(files, pattern):
                raise ValueError(problem)
    if "config.json" not in names and not is_bare:  # which static models are
        raise ValueError("holds no config.json, so it is no model's folder")
    part = static_part(names)
    if part + TOKENIZER_FILE not in names:
        raise ValueError(f"holds no {TOKENIZER_FILE}; save the model's fast tokenizer there")
    if not weights:
        raise ValueError(f"holds none of {', '.join(WEIGHT_FILES)}")
    weights.sort(key=lambda name: name not in known)
    shards = sorted(filter(SHARD.fullmatch, names)) if weights[0] == INDEX_FILE else []
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
    modules = sorted({*filter(MODULE_FILE.fullmatch, names)} - {weights[0]})
    return [*layout, *modules, part + TOKENIZER_FILE, weights[0], *shards, *heads.values()]


def static_part(names: Collection[str]) -> str:
    """Where among *names* a static model's table and tokenizer are: before their names, or empty."""
    is_inside = {*STATIC_WEIGHT_FILES} & {*names} and not {*WEIGHT_FILES} & {*names}
    return STATIC_PART if is_inside else ""


def read_weight_names(folder: Path, used: Collection[str]) -> list[str]:
    """The files among *used* that hold the encoder's weights. Raises `CheckpointRefused`."""
    (first,) = (name for name in used if name in (*WEIGHT_FILES, *STATIC_WEIGHT_FILES))
    if first != INDEX_FILE:
        return [first]
    shards = [name for name in used if SHARD.fullmatch(name)]
    listed = read_json(folder / INDEX_FILE, _WeightIndex, bytes_max=INDEX_BYTES_MAX)
    if {*listed.weight_map.values()} != {*shards}:
        differing = sorted({*listed.weight_map.values()} ^ {*shards})
        raise CheckpointRefused(
            f"{folder / INDEX_FILE}: does not list the weight files that are there; "
            f"{', '.join(differing[:3])} is on one side only. Copy the whole model."
        )
    return shards


def refuse_pointer(file: HashedFile) -> None:
    """Raise `CheckpointRefused` where *file* is only what git-lfs leaves in its place."""
    if file.byte_count < 1024 and file.path.read_bytes().startswith(LFS_POINTER):
        raise CheckpointRefused(
            f"{file.path}: is a git-lfs pointer, not the file itself. Run `git lfs pull` in the "
            "model's repository, or download the file."
        )


def read_config(folder: Path) -> tuple[ModelConfig, HeadPlan | None]:
    """The model that `config.json` of *folder* describes, and the head of its class, if any.

    Raises `CheckpointRefused`.
    """
    file = folder / "config.json"
    try:
        found = read_json(file, dict[str, Any])
        config = registry.read_config(found)
        return config, registry.head_plan(found, config)
    except (ValueError, msgspec.ValidationError) as error:
        raise CheckpointRefused(f"{file}: {error}") from error


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
    normalizer = read_tokenizer(folder).normalizer if settings else None
    if normalizer is not None and normalizer.get("type") == "BertNormalizer":
        for name in settings:
            own_name, default = NORMALIZER_SETTINGS[name]
            own = normalizer.get(own_name, default)
            if found[name] != own:
                raise CheckpointRefused(
                    f"{file}: {name} = {found[name]!r}, but {TOKENIZER_FILE} has {own_name} = "
                    f"{own!r}. Save the tokenizer again, so that both say the same."
                )
    return token_count(file, "model_max_length", found.get("model_max_length"))


def token_count(file: Path, name: str, value: object) -> int | None:
    """A maximum length as configs write it; None where it is null or beyond any model's."""
    if value is None or (isinstance(value, int | float) and value > TOKENS_MAX):
        return None
    if type(value) is not int or value < 1:
        raise CheckpointRefused(f"{file}: {name} = {value!r} is not a count of tokens")
    return value


def read_tokenizer(folder: Path) -> _TokenizerFile:
    return read_json(folder / TOKENIZER_FILE, _TokenizerFile, bytes_max=TOKENIZER_BYTES_MAX)
