"""Tiny models that every test of a backend may open, and batches of random texts for them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tests.checkpoints.tiny import write_tiny

from trivec.checkpoints.checkpoint import Checkpoint, Pooling
from trivec.checkpoints.opening import open_checkpoint

OpenTiny = Callable[[str, Pooling], Checkpoint]


@pytest.fixture(scope="session")
def open_tiny(tmp_path_factory: pytest.TempPathFactory) -> OpenTiny:
    """A checkpoint of two layers of a family and pooling; made once a session."""
    made: dict[tuple[str, Pooling], Checkpoint] = {}

    def opened(family: str, pooling: Pooling) -> Checkpoint:
        if (family, pooling) not in made:
            folder: Path = tmp_path_factory.mktemp("tiny")
            write_tiny(
                folder / "model",
                family=family,
                pooling=pooling,
                hidden=128,
                heads=pooling is Pooling.CLS,
                position_count=700,
            )
            made[family, pooling] = open_checkpoint(
                str(folder / "model"), cache_dir=folder / "cache"
            )
        return made[family, pooling]

    return opened


@pytest.fixture(scope="session")
def tiny_m3(open_tiny: OpenTiny) -> Checkpoint:
    """A tiny model with all three heads."""
    return open_tiny("xlm-roberta", Pooling.CLS)


def random_ids(lengths: list[int], *, seed: int = 0) -> list[list[int]]:
    """A text of each length: `<s>`, random ids of the tiny vocabulary, `</s>`."""
    draw = np.random.default_rng(seed)
    return [[0, *draw.integers(4, 1900, max(0, n - 2)).tolist(), 2][:n] for n in lengths]
