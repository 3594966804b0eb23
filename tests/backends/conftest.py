"""Tiny models that every test of a backend may open, and batches of random texts for them."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tests.checkpoints.tiny import write_tiny

from trivec.backends.openvino.certifying import Trial
from trivec.backends.openvino.recipe import FP32, Recipe
from trivec.backends.openvino.witness import NothingComputed, Plan, open_session
from trivec.checkpoints import open_checkpoint
from trivec.checkpoints.checkpoint import Checkpoint
from trivec.models.pooling import Pooling

OpenTiny = Callable[[str, Pooling], Checkpoint]
SkipUnlessRun = Callable[[Recipe], None]


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


@pytest.fixture(scope="session")
def skip_unless_run(tiny_m3: Checkpoint) -> SkipUnlessRun:
    """Skips where oneDNN is kept from the CPU's instructions and the plugin is stopped by that.

    OpenVINO looks at the CPU itself, takes the grouped form for possible and then computes nothing.
    Where no instruction is hidden nothing is skipped.
    """

    def skip(recipe: Recipe) -> None:
        if "ONEDNN_MAX_CPU_ISA" not in os.environ or recipe is FP32:
            return
        tensors = Trial(tiny_m3, slot_count=1).tensors(recipe)
        try:
            plan = Plan(tiny_m3.config, tensors, recipe)
            open_session(plan, slot_count=1, must_agree=False)
        except NothingComputed:
            pytest.skip(f"the plugin computes nothing in {recipe.name} under ONEDNN_MAX_CPU_ISA")

    return skip
