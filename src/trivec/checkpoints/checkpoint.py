"""What a model is once its files are understood: plain values, and the way to its weights."""

from dataclasses import dataclass
from pathlib import Path

from trivec.checkpoints.convert import converted
from trivec.checkpoints.hashes import HashedFile
from trivec.checkpoints.safetensors_file import open_safetensors
from trivec.checkpoints.weights import Weights
from trivec.core.types import Output
from trivec.models.ops import ModelConfig
from trivec.models.pooling import Heads, Pooling
from trivec.models.registry import FAMILIES, tensor_shapes


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model's files, hashed, checked and understood; only the encoder's weights are unread."""

    id: str
    aliases: tuple[str, ...]
    folder: Path
    config: ModelConfig
    pooling: Pooling
    normalize: bool
    token_count_max: int  # special tokens included
    tokenizer_file: Path
    heads: Heads | None
    digest: str  # sha256 over names and hashes of all files in use: a key for what is made of them
    verified: bool  # every file in use has the hash that the catalogue gives it
    source: str  # "wheel", "hub" or "folder"
    created: int  # Unix seconds
    owned_by: str
    dimensions_selectable: bool
    weight_files: tuple[HashedFile, ...]
    cache_dir: Path

    @property
    def outputs(self) -> Output:
        """What one forward pass can yield."""
        if self.heads is None:
            return Output.DENSE
        return Output.DENSE | Output.SPARSE | Output.MULTI

    def weights(self) -> Weights:
        """Open the encoder's weights: names and shapes are checked now, values as they are taken.

        A torch file is converted first, once: seconds and as much disk under `cache_dir` again.
        Raises `CheckpointRefused`.
        """
        files = [
            converted(file, cache_dir=self.cache_dir) if file.path.suffix == ".bin" else file.path
            for file in self.weight_files
        ]
        opened = [open_safetensors(file) for file in files]
        return Weights(opened, tensor_shapes(self.config), FAMILIES[self.config.family])
