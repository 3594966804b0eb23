"""Static models' folders: a table of token embeddings, as model2vec or sentence-transformers saves it.

model2vec: `embeddings` `[rows, width]`, and where its vocabulary was quantised `mapping`, a token's
row, and `weights`, by which that row is multiplied. sentence-transformers: `embedding.weight`.
"""

from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from trivec.checkpoints.layout import TOKENIZER_BYTES_MAX, TOKENIZER_FILE, read_json, static_part
from trivec.checkpoints.tensor_files import StoredTensor, TensorFiles
from trivec.core.errors import CheckpointRefused
from trivec.core.types import Float32Array, TokenRules
from trivec.models import registry
from trivec.models.ops import ModelConfig
from trivec.models.static import KEY_TENSOR, MODEL_TYPES

NAMES = ("embeddings", "embedding.weight")  # of the table: model2vec's, sentence-transformers'
MODULE = "StaticEmbedding"


def is_static(folder: Path, names: frozenset[str]) -> bool:
    """Whether *folder*, whose files are *names*, holds a static model. Raises `CheckpointRefused`."""
    if "modules.json" in names:
        modules = read_json(folder / "modules.json", list[dict[str, Any]])
        return bool(modules) and str(modules[0].get("type")).endswith(f".{MODULE}")
    config = read_json(folder / "config.json", dict[str, Any]) if "config.json" in names else {}
    return config.get("model_type") in MODEL_TYPES


class StaticTensors(TensorFiles):
    """The one table that is served, made of what a file holds: `[token ids + 1, width]`, float32.

    The last row is of zeros. It takes the memory of a copy while it is being used.
    """

    def __init__(self, stored: TensorFiles) -> None:
        """Raises `CheckpointRefused` for tensors that make no table."""
        self._stored, self.file, self._files = stored, stored.file, stored._files
        found = {name: tensor.shape for name, tensor in stored.tensors.items()}
        self.is_model2vec = NAMES[0] in found
        self._name = NAMES[not self.is_model2vec]
        shape = found.pop(self._name, ())
        shapes = {*found.values()} | ({shape[:1]} if "mapping" not in found else set())
        is_known = not {*found} - {"mapping", "weights"} and len(shape) == 2
        if not is_known or len(shapes) > 1 or len(next(iter(shapes))) != 1:
            raise CheckpointRefused(
                f"{self.file}: holds {', '.join(sorted(stored.tensors)[:4]) or 'nothing'}; a static "
                f"model is a table {' or '.join(NAMES)}, and mapping and weights of one length"
            )
        (self.token_count,) = shapes.pop()
        self.tensors = {KEY_TENSOR: StoredTensor("F32", (self.token_count + 1, shape[1]), 0)}

    def float32(self, name: str) -> Float32Array:
        """The table. Raises `CheckpointRefused` for a mapping to rows that it has not."""
        rows, table = self._stored.numbers(self._name), np.zeros(self.tensors[name].shape, "f4")
        if "mapping" in self._stored.tensors:
            mapping = self._stored.numbers("mapping").astype(np.int64)
            if not ((mapping >= 0) & (mapping < len(rows))).all():
                raise CheckpointRefused(f"{self.file}: its mapping names rows that it has not")
            rows = rows[mapping]
        table[:-1] = rows
        if "weights" in self._stored.tensors:
            table[:-1] *= self._stored.numbers("weights")[:, None]
        if not np.isfinite(table).all():
            raise CheckpointRefused(f"{self.file}: its table holds a value that is not finite")
        return table


def read_static(
    folder: Path, names: frozenset[str], stored: TensorFiles
) -> tuple[ModelConfig, TokenRules, bool | None]:
    """The model, how its texts are read, and whether its vectors are normalised, where
    `modules.json` does not count. Raises `CheckpointRefused`.

    model2vec leaves unknown words out, and reads 512 tokens where its config says nothing else;
    sentence-transformers reads all.
    """
    made = StaticTensors(stored)
    has_config = made.is_model2vec and "config.json" in names
    found = read_json(folder / "config.json", dict[str, Any]) if has_config else {}
    try:
        config = registry.read_config(
            {
                "model_type": MODEL_TYPES[0],
                "hidden_size": made.tensors[KEY_TENSOR].shape[1],
                "vocab_size": made.token_count + 1,
                "max_length": found.get("max_length", 512) if made.is_model2vec else None,
            }
        )
    except ValueError as error:
        raise CheckpointRefused(f"{made.file}: {error}") from error
    tokenizer_file = folder / static_part(names) / TOKENIZER_FILE
    unknown = _unknown_token_id(tokenizer_file) if made.is_model2vec else None
    rules = TokenRules(
        has_specials=False, dropped_token_id=unknown, blank_token_id=made.token_count
    )
    is_told = "normalize" in found or "modules.json" not in names
    return config, rules, bool(found.get("normalize")) if is_told else None


def _unknown_token_id(file: Path) -> int | None:
    """The id of words that the vocabulary has not, or None. Raises `CheckpointRefused`."""
    model = read_json(file, dict[str, Any], bytes_max=TOKENIZER_BYTES_MAX).get("model") or {}
    if "unk_id" in model:
        return int(model["unk_id"]) if model["unk_id"] is not None else None
    unknown = model.get("unk_token")
    codec = tokenizers.Tokenizer.from_file(str(file))
    return None if unknown is None else codec.token_to_id(unknown)
