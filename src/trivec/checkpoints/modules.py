"""Modules: what sentence-transformers' files say of how hidden states become vectors or scores.

The layouts of its versions 2 to 6. A setting that would change a vector and is not understood is
refused by its name.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from trivec.checkpoints.colbert import PYLATE_KEYS
from trivec.checkpoints.heads import read_module_linear, read_module_norm
from trivec.checkpoints.layout import STATIC_PART, read_json, token_count
from trivec.core.errors import CheckpointRefused
from trivec.core.types import NO_PROMPTS
from trivec.models.pooling import HeadLayer, Nonlinearity, Pooling

# Settings of the files, and the values of an ordinary text encoder, which change no vector here;
# `...`: any value. Others are refused, for the reason given or as not understood.
ORDINARY_MODEL: Mapping[str, object] = {
    "__version__": ...,
    "prompts": ...,
    "default_prompt_name": ...,
    "similarity_fn_name": ...,
    "activation_fn": ...,  # of scores, which are served as they are
    "truncate_dim": ...,
    **dict.fromkeys(PYLATE_KEYS, ...),
    "model_type": (
        None,
        "ColBERT",
        "SentenceTransformer",
        "CrossEncoder",
        "SparseEncoder",
        "MultiVectorEncoder",
    ),
}
ORDINARY_TRANSFORMER: Mapping[str, object] = {
    "max_seq_length": ...,
    "unpad_inputs": ...,  # how a batch is laid out in memory
    "do_lower_case": (False,),
    "transformer_task": ("feature-extraction", "sequence-classification", "fill-mask"),
    "modality_config": tuple(
        {"text": {"method": "forward", "method_output_name": name}}
        for name in ("last_hidden_state", "logits")
    ),
    "module_output_name": ("token_embeddings", "scores"),
    "query_length": ...,
    "document_length": ...,
    "query_expansion": ...,
}
COLBERT_KEYS = ("query_length", "document_length", "query_expansion")  # of the Transformer module
NAMES = ("module_input_name", "module_output_name")
TOKENS, SENTENCE = "token_embeddings", "sentence_embedding"
ORDINARY_DENSE = {
    "in_features": ...,
    "out_features": ...,
    "bias": (True, False),
    "activation_function": ...,
    "use_residual": (False,),
}
ORDINARY_SPLADE = {
    "pooling_strategy": ("max",),
    "activation_function": ("relu", "log1p_relu"),
    "embedding_dimension": ...,  # of no effect
    "word_embedding_dimension": ...,
    "chunk_size": ...,  # how much is in memory at once
}
ORDINARY_MASK = {"skiplist_words": ..., "skiplist_tasks": ..., "keep_only_token_ids": (None,)}
REASONS = {
    "embedding_dimension": "is not the width of the encoder's vectors.",
    "word_embedding_dimension": "is not the width of the encoder's vectors.",
}
POOLING_MODES = {  # flags of older sentence-transformers, in the order in which these lay vectors
    "pooling_mode_cls_token": Pooling.CLS,
    "pooling_mode_max_tokens": Pooling.MAX,
    "pooling_mode_mean_tokens": Pooling.MEAN,
    "pooling_mode_mean_sqrt_len_tokens": Pooling.MEAN_SQRT_LEN,
    "pooling_mode_weightedmean_tokens": Pooling.WEIGHTED_MEAN,
    "pooling_mode_lasttoken": Pooling.LAST,
}
NONLINEARITIES = {  # by the last part of a torch module's name
    "Identity": Nonlinearity.IDENTITY,
    "Tanh": Nonlinearity.TANH,
    "GELU": Nonlinearity.GELU,
    "ReLU": Nonlinearity.RELU,
}
MODULE_PATH = re.compile(r"\d+_\w+", re.ASCII)
# Of newer sentence-transformers, of model2vec, of older sentence-transformers.
STATIC_PATHS = ("", ".", STATIC_PART.rstrip("/"))
PYLATE_DENSE = "pylate.models.Dense.Dense"
SETTINGS_FILE = "config_sentence_transformers.json"


class _Module(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    type: str
    path: str
    idx: int = 0
    name: str = ""

    @property
    def kind(self) -> str:
        return self.type.rpartition(".")[2]


@dataclass(frozen=True, slots=True)
class PromptSettings:
    """What `config_sentence_transformers.json` says of prompts and of the length of a vector."""

    prompts: Mapping[str, str] = field(default_factory=lambda: NO_PROMPTS)
    default_prompt_name: str | None = None
    truncate_dim: int | None = None
    colbert: Mapping[str, Any] = field(default_factory=dict)  # PyLate's keys


@dataclass(slots=True)
class Modules:
    """What `modules.json` leads to, gathered module by module."""

    pooling: tuple[Pooling, ...] = ()
    include_prompt: bool = True
    layers: tuple[HeadLayer, ...] = ()  # after pooling; without pooling on each token
    normalize: bool = False
    is_splade: bool = False
    takes_log_twice: bool = False
    mask: Mapping[str, Any] = field(default_factory=dict)  # settings of MultiVectorMask
    is_pylate: bool = False

    @property
    def is_multi(self) -> bool:
        """Each token has a vector of its own."""
        return not self.pooling and not self.is_splade and (self.normalize or bool(self.layers))


def read_prompt_settings(folder: Path, names: frozenset[str]) -> PromptSettings:
    """What `config_sentence_transformers.json` says, if it is there. Raises `CheckpointRefused`."""
    file = folder / SETTINGS_FILE
    if SETTINGS_FILE not in names:
        return PromptSettings()
    found = _read_settings(file, ORDINARY_MODEL)
    try:
        prompts = msgspec.convert(found.get("prompts") or {}, dict[str, str])
        cut = msgspec.convert(found.get("truncate_dim"), int | None)
    except msgspec.ValidationError as error:
        raise CheckpointRefused(f"{file}: not understood: {error}") from error
    default = found.get("default_prompt_name") or None
    if default is not None and default not in prompts:
        raise CheckpointRefused(f"{file}: default_prompt_name = {default!r} is none of its prompts")
    if cut is not None and cut < 1:
        raise CheckpointRefused(f"{file}: truncate_dim = {cut} leaves nothing of a vector")
    colbert = {name: found[name] for name in PYLATE_KEYS if name in found}
    return PromptSettings(prompts, default, cut, colbert)


def read_transformer(folder: Path, names: frozenset[str]) -> tuple[int | None, Mapping[str, Any]]:
    """`max_seq_length` and the settings of token vectors, where `sentence_bert_config.json` has them.

    Raises `CheckpointRefused`.
    """
    file = folder / "sentence_bert_config.json"
    if file.name not in names:
        return None, {}
    found = _read_settings(file, ORDINARY_TRANSFORMER)
    length = token_count(file, "max_seq_length", found.get("max_seq_length"))
    return length, {name: found[name] for name in COLBERT_KEYS if found.get(name) is not None}


def read_modules(folder: Path, names: frozenset[str], *, hidden_size: int) -> Modules:
    """What the modules after the encoder do. Raises `CheckpointRefused`.

    *names* are the folder's files as `scan` lists them; `modules.json` must be among them.
    """
    file = folder / "modules.json"
    listed = read_json(file, list[_Module])
    for module in listed:
        if module.type.partition(".")[0] != "sentence_transformers" and module.type != PYLATE_DENSE:
            raise CheckpointRefused(
                f"{file}: module type {module.type!r} is code of the model's own; none is run"
            )
    kinds = ", ".join(module.kind for module in listed) or "none"
    is_static = bool(listed) and listed[0].kind == "StaticEmbedding"
    if not is_static and (not listed or listed[0].kind not in ("Transformer", "MLMTransformer")):
        raise CheckpointRefused(f"{file}: names the modules {kinds}; the first is no Transformer")
    if listed[0].path not in (STATIC_PATHS if is_static else ("",)) or not all(
        MODULE_PATH.fullmatch(one.path) for one in listed[1:]
    ):
        paths = ", ".join(module.path or "." for module in listed)
        raise CheckpointRefused(
            f"{file}: keeps its modules in {paths}; understood are the folder itself and others "
            "such as 1_Pooling"
        )
    made, width = Modules(), hidden_size
    if is_static:
        made.pooling = (Pooling.MEAN,)
    for module in listed[1:]:
        part = folder / module.path
        has_config = f"{module.path}/config.json" in names
        if not has_config and module.kind not in ("Normalize", "Dropout"):
            raise CheckpointRefused(f"{part / 'config.json'}: is missing; copy the whole model")
        expected = dict.fromkeys(NAMES, (SENTENCE if made.pooling else TOKENS,))
        is_first = made == Modules()
        match module.kind:
            case "Pooling" if is_first:
                made.pooling, made.include_prompt = _read_pooling(part / "config.json", width)
                width *= len(made.pooling)
            case "SpladePooling" if is_first:
                found = _read_settings(part / "config.json", ORDINARY_SPLADE)
                made.is_splade = True
                made.takes_log_twice = found.get("activation_function") == "log1p_relu"
            case "Dense" if not made.normalize and not made.is_splade:
                found = _read_settings(part / "config.json", {**ORDINARY_DENSE, **expected})
                made.layers += (_read_dense(part, names, found, width=width),)
                width = int(found["out_features"])
                if module.type == PYLATE_DENSE:  # whose code normalises each row
                    made.is_pylate = True
            case "LayerNorm" if made.pooling and not made.normalize:
                _read_settings(part / "config.json", {"dimension": (width,)})
                own_names = _names_in(module.path, names)
                made.layers += (read_module_norm(part, own_names, width=width),)
            case "MultiVectorMask" if not made.pooling and not made.is_splade:
                made.mask = _read_settings(part / "config.json", ORDINARY_MASK)
            case "Normalize" if not made.normalize and not made.is_splade:
                if has_config:
                    _read_settings(part / "config.json", expected)
                made.normalize = True
            case "Dropout":  # of training
                pass
            case _:
                raise CheckpointRefused(
                    f"{file}: names the modules {kinds}; {module.kind} is not understood there. "
                    "Understood are Pooling, then Dense and LayerNorm, then Normalize; "
                    "SpladePooling; or for token vectors Dense, MultiVectorMask and Normalize"
                )
    made.normalize |= made.is_pylate
    return made


def _read_pooling(file: Path, hidden_size: int) -> tuple[tuple[Pooling, ...], bool]:
    """The modes of a Pooling module, and whether a prompt's tokens take part."""
    width = (None, hidden_size)
    found = _read_settings(
        file,
        {
            "include_prompt": (True, False),
            "embedding_dimension": width,
            "word_embedding_dimension": width,
            **dict.fromkeys((*POOLING_MODES, "pooling_mode"), ...),
        },
    )
    named = found.get("pooling_mode") or []
    try:
        modes = [Pooling(one) for one in ([named] if isinstance(named, str) else named)]
    except (TypeError, ValueError) as error:
        raise CheckpointRefused(f"{file}: pooling_mode = {named!r} is not understood") from error
    modes = modes or [mode for name, mode in POOLING_MODES.items() if found.get(name)]
    if not modes:
        raise CheckpointRefused(f"{file}: asks for no pooling")
    return tuple(modes), found.get("include_prompt") is not False


def _read_dense(
    folder: Path, names: frozenset[str], found: Mapping[str, Any], *, width: int
) -> HeadLayer:
    """The layer of a Dense module, for rows of *width*."""
    function = str(found.get("activation_function", "torch.nn.modules.activation.Tanh"))
    kind = function.rpartition(".")[2] if function.startswith("torch.nn.") else ""
    if kind not in NONLINEARITIES:
        raise CheckpointRefused(
            f"{folder / 'config.json'}: activation_function = {function!r} is not understood; "
            f"understood are {', '.join(NONLINEARITIES)}"
        )
    layer = read_module_linear(
        folder,
        _names_in(folder.name, names),
        bias=bool(found.get("bias", True)),
        nonlinearity=NONLINEARITIES[kind],
        width=width,
    )
    if (found.get("in_features"), found.get("out_features")) != (width, len(layer.weight)):
        raise CheckpointRefused(
            f"{folder / 'config.json'}: in_features and out_features are not {width} and "
            f"{len(layer.weight)}, as its weights and the module before it say"
        )
    return layer


def _names_in(path: str, names: frozenset[str]) -> set[str]:
    """The files in the folder *path*."""
    return {name.removeprefix(f"{path}/") for name in names if name.startswith(f"{path}/")}


def _read_settings(file: Path, ordinary: Mapping[str, object]) -> dict[str, Any]:
    """The settings in *file*. Raises `CheckpointRefused` for one that is not as *ordinary*."""
    found = read_json(file, dict[str, Any])
    for name, value in found.items():
        values = ordinary.get(name, ())
        if isinstance(values, tuple) and value not in values:
            reason = REASONS.get(name, "is not understood")
            raise CheckpointRefused(f"{file}: {name} = {value!r} {reason}")
    return found
