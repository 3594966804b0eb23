"""BGE-M3's heads: two small files beside the encoder, each a linear layer's weight and bias."""

from pathlib import Path

import msgspec
import numpy as np

from trivec.checkpoints.folder import read_json
from trivec.checkpoints.safetensors_file import open_safetensors
from trivec.checkpoints.torch_file import open_torch_file
from trivec.core.errors import CheckpointRefused
from trivec.core.types import Float32Array
from trivec.models.pooling import Heads

SPARSE = "sparse_linear"
MULTI = "colbert_linear"
SUFFIXES = (".safetensors", ".pt")
# What never is a lexical weight, with the names XLM-R's tokenizer gives by default.
IGNORED_TOKENS = {
    "cls_token": "<s>",
    "eos_token": "</s>",
    "pad_token": "<pad>",
    "unk_token": "<unk>",
}


class _AddedToken(msgspec.Struct, frozen=True):
    id: int
    content: str


class _TokenizerFile(msgspec.Struct, frozen=True):
    """The only part of `tokenizer.json` that is read here; the rest is skipped, not built."""

    added_tokens: list[_AddedToken] = []


class _NamedToken(msgspec.Struct, frozen=True):
    content: str


def head_files(names: frozenset[str]) -> list[str]:
    """The head files among a folder's *names*: none or two.

    Raises `ValueError` when one head is there without the other.
    """
    found = {
        head: [head + suffix for suffix in SUFFIXES if head + suffix in names][:1]
        for head in (SPARSE, MULTI)
    }
    chosen = [file for files in found.values() for file in files]
    if len(chosen) == 1:
        lacking = next(head for head, files in found.items() if not files)
        raise ValueError(f"holds {chosen[0]} but no {lacking}.pt; copy both heads, or neither")
    return chosen


def read_heads(folder: Path, files: list[str], *, hidden_size: int) -> Heads:
    """Both heads, widened to float32. *files* as `head_files` gives them. Raises `CheckpointRefused`."""
    sparse_weight, sparse_bias = _read_linear(folder / files[0], hidden_size)
    multi_weight, multi_bias = _read_linear(folder / files[1], hidden_size)
    if len(sparse_bias) != 1:
        raise CheckpointRefused(
            f"{folder / files[0]}: has {len(sparse_bias)} outputs; a lexical weight is one number"
        )
    return Heads(sparse_weight, sparse_bias, multi_weight, multi_bias, _ignored_token_ids(folder))


def _read_linear(file: Path, hidden_size: int) -> tuple[Float32Array, Float32Array]:
    """Weight `[out, hidden]` and bias `[out]`, in memory of their own."""
    tensors = open_safetensors(file) if file.suffix == ".safetensors" else open_torch_file(file)
    if set(tensors.tensors) != {"weight", "bias"}:
        raise CheckpointRefused(
            f"{file}: holds {', '.join(sorted(tensors.tensors)[:4]) or 'nothing'}; a head is "
            "weight and bias"
        )
    weight, bias = tensors.float32("weight"), tensors.float32("bias")
    if weight.ndim != 2 or bias.ndim != 1 or weight.shape != (len(bias), hidden_size):
        raise CheckpointRefused(
            f"{file}: weight has shape {list(weight.shape)} and bias {list(bias.shape)}; expected "
            f"are [outputs, {hidden_size}] and [outputs]"
        )
    return np.array(weight), np.array(bias)


def _ignored_token_ids(folder: Path) -> tuple[int, ...]:
    added = {
        token.content: token.id for token in _read_tokenizer(folder / "tokenizer.json").added_tokens
    }
    ids = []
    for name, content in _special_tokens(folder).items():
        if content not in added:
            raise CheckpointRefused(
                f"{folder / 'tokenizer.json'}: its {name} {content!r} is no added token, so it "
                "cannot be kept out of sparse vectors"
            )
        ids.append(added[content])
    return tuple(sorted(set(ids)))


def _special_tokens(folder: Path) -> dict[str, str]:
    """What the special tokens are called; the first file that says so is believed."""
    tokens = dict(IGNORED_TOKENS)
    for file in (folder / "tokenizer_config.json", folder / "special_tokens_map.json"):
        if not file.is_file():
            continue
        said = read_json(file, dict[str, msgspec.Raw])
        for name in IGNORED_TOKENS:
            # BERT's files call the closing token sep, and may have no eos.
            written = name if name in said or name != "eos_token" else "sep_token"
            if written in said:
                tokens[name] = _content(file, said[written])
    return tokens


def _content(file: Path, raw: msgspec.Raw) -> str:
    try:
        token = msgspec.json.decode(raw, type=str | _NamedToken)
    except msgspec.MsgspecError as error:
        raise CheckpointRefused(f"{file}: not understood: {error}") from error
    return token if isinstance(token, str) else token.content


def _read_tokenizer(file: Path) -> _TokenizerFile:
    try:
        return msgspec.json.decode(file.read_bytes(), type=_TokenizerFile)
    except (OSError, RecursionError, msgspec.MsgspecError) as error:
        raise CheckpointRefused(f"{file}: not understood: {error}") from error
