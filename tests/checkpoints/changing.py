"""What several suites do with a tiny model: take all its weights, or change its files."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from trivec.checkpoints.checkpoint import Checkpoint
from trivec.core.types import Float32Array
from trivec.models.registry import tensor_shapes


def take_all(checkpoint: Checkpoint) -> dict[str, Float32Array]:
    """Every weight of the encoder by its canonical name."""
    with checkpoint.weights() as weights:
        taken = {name: weights.take(name) for name in tensor_shapes(checkpoint.config)}
        weights.finish()
    return taken


def rewrite(folder: Path, change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]) -> None:
    """Replace the tensors of *folder*'s `model.safetensors` with what *change* makes of them."""
    file = folder / "model.safetensors"
    tensors = {name: np.array(array) for name, array in load_file(file).items()}
    save_file(change(tensors), file)
