"""What a machine computes exactly is found out, and 7 bits of weights lose less than they would."""

import os
from pathlib import Path

import numpy as np
import pytest

from trivec.backends.openvino import trial
from trivec.backends.openvino.quantise import (
    INT8_CONV,
    INT8_GROUPS_128,
    INT8_ROWS,
    WEIGHT_MAX,
    quantise,
    rounded_with_feedback,
)
from trivec.backends.openvino.trial import ProductTrial, kernel_flags, try_products


def plain_twin(steps: np.ndarray, inputs: np.ndarray, most: int) -> np.ndarray:
    """One output at a time, one channel at a time, the inverse made anew for those that are left."""
    order = np.argsort(-(inputs**2).sum(axis=0), kind="stable")
    squares = inputs.T.astype(np.float64) @ inputs
    squares += np.eye(len(squares)) * 0.01 * np.diag(squares).mean()
    whole = np.zeros(steps.shape)
    for output, row in enumerate(steps.astype(np.float64)):
        left = row.copy()
        for place, channel in enumerate(order):
            whole[output, channel] = np.clip(np.rint(left[channel]), -most, most)
            error = left[channel] - whole[output, channel]
            rest = order[place + 1 :]
            if len(rest):  # least squares: what the others must give to keep the product
                others = np.linalg.solve(
                    squares[np.ix_(rest, rest)], squares[rest, channel] * error
                )
                left[rest] += others
    return whole


def test_rounding_with_feedback_equals_its_twin() -> None:
    draw = np.random.default_rng(0)
    mixed = draw.standard_normal((80, 80)) @ draw.standard_normal((80, 80))
    inputs = (draw.standard_normal((300, 80)) @ mixed).astype(np.float32)
    weight = draw.standard_normal((5, 80)).astype(np.float32)
    steps = weight / quantise(weight, 7)[1]
    found = rounded_with_feedback(steps, inputs, 7)
    expected = plain_twin(steps, inputs, 64)
    assert (found != expected).mean() < 0.02  # halves, where float32 and float64 part
    lost, plainly = (
        np.linalg.norm(inputs @ (steps - whole).T) for whole in (found, np.rint(steps))
    )
    assert lost < 0.6 * plainly


def test_feedback_reaches_over_blocks_and_keeps_within_the_bits() -> None:
    draw = np.random.default_rng(1)
    inputs = (draw.standard_normal((400, 4)) @ draw.standard_normal((4, 600))).astype(np.float32)
    inputs += 0.1 * draw.standard_normal(inputs.shape, np.float32)
    inputs[:, 7] = 0  # a channel that is always zero
    steps = draw.uniform(-64, 64, (30, 600)).astype(np.float32)
    found = rounded_with_feedback(steps, inputs, 7)
    assert np.abs(found).max() <= WEIGHT_MAX[7]
    lost, plainly = (
        np.linalg.norm(inputs @ (steps - whole).T) for whole in (found, np.rint(steps))
    )
    assert lost < 0.3 * plainly


def test_seven_bits_are_always_exact_and_eight_only_with_vnni() -> None:
    """Pairs of products in int16: 2 * 255 * 64 is within, 2 * 255 * 127 is not."""
    found = try_products(64, 256)
    has_vnni = kernel_flags() == []
    for form in (INT8_ROWS, INT8_CONV):
        assert found[form].exact_bits == (8 if has_vnni else 7)
    assert not found[INT8_ROWS].weights_only
    if "ONEDNN_MAX_CPU_ISA" not in os.environ:
        assert found[INT8_GROUPS_128].weights_only is not has_vnni


@pytest.mark.parametrize(
    ("cpu", "mask", "flags"),
    [
        pytest.param("flags : sse2 avx2 avx512_vnni", "", [], id="vnni"),
        pytest.param("flags : sse2 avx2 avx_vnni", "", [], id="vnni-of-avx2"),
        pytest.param("flags : sse2 avx2", "", ["avx2"], id="avx2"),
        pytest.param("flags : avx2 avx512bw", "", ["avx2", "avx512bw"], id="avx512"),
        pytest.param("Features : asimddp i8mm", "", ["asimddp", "i8mm"], id="arm64"),
        pytest.param(
            "flags : avx2 avx512_vnni",
            "AVX2",
            ["ONEDNN_MAX_CPU_ISA=AVX2", "OV_CPU_MAX_ISA=AVX2"],
            id="masked",
        ),
    ],
)
def test_what_is_prepared_for_one_kind_of_cpu_is_not_read_by_another(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cpu: str,
    mask: str,
    flags: list[str],
) -> None:
    """With VNNI nothing is added: what was prepared before goes on being read."""
    file = tmp_path / "cpuinfo"
    file.write_text(f"processor : 0\n{cpu}\n")
    monkeypatch.setattr(trial, "CPU_FILE", file)
    for name in trial.ISA_CAPS:
        monkeypatch.setenv(name, mask)
    assert kernel_flags() == flags


def test_what_is_no_faster_than_fp32_says_so() -> None:
    slow = ProductTrial(speed=0.94, exact_bits=8, weights_only=True)
    assert not slow.is_faster
    assert str(slow) == "linear layers 0.94 times as fast, weights only: for memory, not for speed"
