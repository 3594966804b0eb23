"""Heads of a model as arrays: the layers that its files hold beside the encoder's weights."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from trivec.checkpoints.layout import TOKENIZER_FILE, read_json, read_tokenizer
from trivec.checkpoints.tensor_files import TensorFiles, open_tensor_file
from trivec.core.errors import CheckpointRefused
from trivec.core.types import Float32Array
from trivec.models.pooling import (
    HeadLayer,
    HeadLinear,
    HeadNorm,
    HeadPlan,
    Heads,
    LinearName,
    Nonlinearity,
    NormName,
)

# What never is a lexical weight, with the names XLM-R's tokenizer gives by default.
IGNORED_TOKENS = {
    "cls_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"
}  # fmt: skip
NORM_EPS = 1e-5  # torch's own, which a LayerNorm module has


def read_planned(
    plan: HeadPlan, stored: TensorFiles, *, prefixes: Sequence[str], width: int
) -> tuple[tuple[HeadLayer, ...], frozenset[str]]:
    """The layers of *plan* for pooled rows of *width*, and the names of the tensors they are.

    A name stands in the file with one of *prefixes* or without. Raises `CheckpointRefused`.
    """
    used: set[str] = set()

    def name_of(name: str) -> str:
        found = [prefix + name for prefix in ("", *prefixes) if prefix + name in stored.tensors]
        used.update(found[:1])
        return found[0] if found else name

    layers: list[HeadLayer] = []
    for one in plan.layers:
        weight, bias = name_of(one.weight), None if one.bias is None else name_of(one.bias)
        if isinstance(one, NormName):
            layers.append(_read_norm(stored, weight, bias, width=width, eps=one.eps))
            continue
        linear = read_linear(stored, LinearName(weight, bias, one.nonlinearity), width=width)
        layers.append(linear)
        width = len(linear.weight)
    return tuple(layers), frozenset(used)


def read_linear(stored: TensorFiles, names: LinearName, *, width: int) -> HeadLinear:
    """The layer that *names* say, for rows of *width*. Raises `CheckpointRefused`."""
    weight = _tensor(stored, names.weight)
    if weight.ndim != 2 or weight.shape[1] != width:
        raise CheckpointRefused(
            f"{stored.file}: {names.weight} has shape {list(weight.shape)}; expected is "
            f"[outputs, {width}]"
        )
    bias = None if names.bias is None else _tensor(stored, names.bias, shape=(len(weight),))
    return HeadLinear(weight, bias, names.nonlinearity)


def read_module_linear(
    folder: Path, names: Collection[str], *, bias: bool, nonlinearity: Nonlinearity, width: int
) -> HeadLinear:
    """The layer of a Dense module in *folder*. Raises `CheckpointRefused`."""
    wanted = LinearName("linear.weight", "linear.bias" if bias else None, nonlinearity)
    stored = _module_tensors(folder, names, {wanted.weight, wanted.bias} - {None})
    return read_linear(stored, wanted, width=width)


def read_module_norm(folder: Path, names: Collection[str], *, width: int) -> HeadNorm:
    """The layer of a LayerNorm module in *folder*. Raises `CheckpointRefused`."""
    stored = _module_tensors(folder, names, {"norm.weight", "norm.bias"})
    return _read_norm(stored, "norm.weight", "norm.bias", width=width, eps=NORM_EPS)


def read_m3_heads(folder: Path, files: Sequence[str], *, hidden_size: int) -> Heads:
    """BGE-M3's two heads, widened to float32. *files*: sparse, then multi. Raises `CheckpointRefused`."""
    sparse, multi = (_read_m3_linear(folder / file, hidden_size) for file in files)
    assert sparse.bias is not None
    assert multi.bias is not None
    if len(sparse.bias) != 1:
        raise CheckpointRefused(
            f"{folder / files[0]}: has {len(sparse.bias)} outputs; a lexical weight is one number"
        )
    return Heads(sparse.weight, sparse.bias, multi.weight, multi.bias, _ignored_token_ids(folder))


def _read_m3_linear(file: Path, hidden_size: int) -> HeadLinear:
    stored = TensorFiles([open_tensor_file(file)])
    if {*stored.tensors} != {"weight", "bias"}:
        raise CheckpointRefused(
            f"{file}: holds {', '.join(sorted(stored.tensors)[:4]) or 'nothing'}; a head is "
            "weight and bias"
        )
    return read_linear(stored, LinearName("weight", "bias"), width=hidden_size)


def _module_tensors(
    folder: Path, names: Collection[str], wanted: Collection[str | None]
) -> TensorFiles:
    """The tensors of a module, which are *wanted* and no others."""
    files = [name for name in ("model.safetensors", "pytorch_model.bin") if name in names]
    if not files:
        raise CheckpointRefused(f"{folder}: holds no model.safetensors; copy the whole model")
    stored = TensorFiles([open_tensor_file(folder / files[0])])
    if {*stored.tensors} != {*wanted}:
        raise CheckpointRefused(
            f"{stored.file}: holds {', '.join(sorted(stored.tensors)[:4]) or 'nothing'}; expected "
            f"are {', '.join(sorted(map(str, wanted)))}"
        )
    return stored


def _read_norm(
    stored: TensorFiles, weight: str, bias: str | None, *, width: int, eps: float
) -> HeadNorm:
    shift = None if bias is None else _tensor(stored, bias, shape=(width,))
    return HeadNorm(_tensor(stored, weight, shape=(width,)), shift, eps)


def _tensor(
    stored: TensorFiles, name: str, *, shape: tuple[int, ...] | None = None
) -> Float32Array:
    """The tensor *name*; a view where the file holds float32, so that a word table is there once."""
    if name not in stored.tensors:
        raise CheckpointRefused(f"{stored.file}: lacks {name}. Is its config.json its own?")
    found = stored.float32(name)
    if shape is not None and found.shape != shape:
        raise CheckpointRefused(
            f"{stored.file}: {name} has shape {list(found.shape)}; expected is {list(shape)}"
        )
    return found


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
    added = {token.content: token.id for token in read_tokenizer(folder).added_tokens}
    for name, content in tokens.items():
        if content not in added:
            raise CheckpointRefused(
                f"{folder / TOKENIZER_FILE}: its {name} {content!r} is no added token, so it "
                "cannot be kept out of sparse vectors"
            )
    return tuple(sorted({added[content] for content in tokens.values()}))
