"""Tiny models that every test of a backend may open, and batches of random texts for them."""

import os
from collections.abc import Callable

import numpy as np
import pytest
from tests.support.families import open_family

from trivec.backends.openvino.calibrate import Calibration
from trivec.backends.openvino.quantise import FP32, QuantScheme, Tensors, make_tensors
from trivec.backends.openvino.session import WrongOutputShape, open_session
from trivec.checkpoints.checkpoint import Checkpoint
from trivec.models.pooling import Pooling

OpenTiny = Callable[[str, Pooling], Checkpoint]
TensorsIn = Callable[[QuantScheme], Tensors]


@pytest.fixture(scope="session")
def open_tiny(tmp_path_factory: pytest.TempPathFactory) -> OpenTiny:
    """A checkpoint of a few layers of a family and pooling; made once a session."""
    made: dict[tuple[str, Pooling], Checkpoint] = {}

    def opened(family: str, pooling: Pooling) -> Checkpoint:
        if (family, pooling) not in made:
            made[family, pooling] = open_family(tmp_path_factory.mktemp("tiny"), family, pooling)
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
def calibration(tiny_m3: Checkpoint) -> Calibration:
    return Calibration(tiny_m3, slot_count=1)


@pytest.fixture(scope="session")
def tensors_in(tiny_m3: Checkpoint, calibration: Calibration) -> TensorsIn:
    """`tiny_m3`'s tensors in a scheme; the test is skipped where the plugin cannot run it.

    Where oneDNN is kept from the CPU's instructions, OpenVINO looks at the CPU itself, takes the
    grouped form for possible and then computes nothing. Where no instruction is hidden nothing is
    skipped.
    """

    def tensors(scheme: QuantScheme) -> Tensors:
        if scheme == FP32:
            return make_tensors(tiny_m3, FP32)
        made = calibration.tensors(scheme)
        if "ONEDNN_MAX_CPU_ISA" in os.environ:
            try:
                open_session(tiny_m3, made, scheme, slot_count=1)
            except WrongOutputShape:
                pytest.skip(f"nothing is computed in {scheme.name} under ONEDNN_MAX_CPU_ISA")
        return made

    return tensors
