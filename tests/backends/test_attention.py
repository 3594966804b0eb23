"""Attention alone: what bf16 changes and what it must not, and when it is taken."""

from typing import Any

import numpy as np
import openvino as ov
import pytest
from openvino import opset15 as op

from trivec.backends.openvino.graph import Places, attend
from trivec.backends.openvino.packing import HIDDEN_SCORE, LENGTH_SIZES, round_up
from trivec.backends.openvino.session import open_core
from trivec.backends.openvino.trial import bf16_pays, has_bf16
from trivec.core.types import Float32Array
from trivec.models.ops import AttentionSpec

HEADS = AttentionSpec(heads=4, head_dim=32, kv_heads=4)
HIDDEN = HEADS.size


def compiled(*, bf16: bool, causal: bool = False) -> ov.CompiledModel:
    """Attention of a text over itself: tokens, places, bias and mask in, mixed tokens out."""
    x = op.parameter([-1, HIDDEN], np.float32)
    places = op.parameter([-1, -1], np.int32)
    bias = op.parameter([-1, 1, 1, -1], np.float32)
    mask = op.parameter([-1, -1], np.bool_)
    nodes = attend(
        op.multiply(x, op.constant(np.float32(HEADS.head_dim**-0.5))),
        op.add(x, op.constant(np.float32(0.5))),
        op.multiply(x, op.constant(np.float32(-2))),
        spec=HEADS,
        places=Places(places, places, bias),
        mask=mask if causal else None,
        bf16=bf16,
    )
    model = ov.Model([op.result(nodes)], [x, places, bias, mask])
    properties = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    return open_core().compile_model(model, "CPU", properties)


def attended(model: ov.CompiledModel, x: Float32Array, *, length: int) -> Float32Array:
    """Of the text *x* padded to *length* with its first token, as `packing` pads."""
    places = np.zeros((1, length), np.int32)
    places[0, : len(x)] = np.arange(len(x))
    bias = np.full((1, 1, 1, length), HIDDEN_SCORE, np.float32)
    bias[..., : len(x)] = 0
    found: Float32Array = model([x, places, bias, np.tri(length, dtype=np.bool_)])[0][: len(x)]
    return found.copy()


def plain(x: Float32Array, *, causal: bool) -> Float32Array:
    q, k, v = (
        part.reshape(len(x), HEADS.heads, HEADS.head_dim).transpose(1, 0, 2).astype(np.float64)
        for part in (x * HEADS.head_dim**-0.5, x + 0.5, x * -2)
    )
    weights = np.exp(q @ k.transpose(0, 2, 1)) * (np.tri(len(x)) if causal else 1)
    weights /= weights.sum(axis=-1, keepdims=True)
    together: Float32Array = (weights @ v).transpose(1, 0, 2).reshape(len(x), HIDDEN)
    return together


def states(tokens: int) -> Float32Array:
    return np.random.default_rng(tokens).standard_normal((tokens, HIDDEN), np.float32)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(
    ("bf16", "tolerance"),
    [
        pytest.param(False, 1e-5, id="fp32"),
        # Scores up to 8 rounded by 2⁻⁸ of themselves move a weight by 3 %, of values up to 6.
        pytest.param(True, 0.1, id="bf16"),
    ],
)
def test_it_is_the_formula_to_the_digits_of_its_type(
    bf16: bool, tolerance: float, causal: bool
) -> None:
    model = compiled(bf16=bf16, causal=causal)
    for tokens in (1, 2, 17, 100, 513):
        x = states(tokens)
        found = attended(model, x, length=round_up(tokens, LENGTH_SIZES))
        assert np.abs(found - plain(x, causal=causal)).max() <= tolerance


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_bits_do_not_depend_on_the_padding(bf16: bool, causal: bool) -> None:
    model = compiled(bf16=bf16, causal=causal)
    for tokens in (1, 2, 15, 16, 33, 100, 257, 512, 700):
        x = states(tokens)
        least = -(-tokens // 16) * 16
        expected = attended(model, x, length=least).tobytes()
        for more in (16, 48, 256, 1024):
            assert attended(model, x, length=least + more).tobytes() == expected


def test_every_length_that_attention_runs_in_is_a_multiple_of_16() -> None:
    assert all(round_up(length, LENGTH_SIZES) % 16 == 0 for length in range(1, 8193))


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_both_products_and_softmax_are_one_kernel_of_the_plugin(causal: bool) -> None:
    """Apart from each other they take half as long again; a new plugin must not split them.

    In bf16 this is so where the CPU has bf16 products, and only there attention is ever in bf16.
    """
    for bf16 in {False, has_bf16()}:
        nodes = compiled(bf16=bf16, causal=causal).get_runtime_model().get_ordered_ops()
        kinds = [node.get_rt_info()["layerType"].astype(str) for node in nodes]
        assert kinds.count("Subgraph") == 1
        assert "MatMul" not in kinds
        assert "Softmax" not in kinds


def test_bf16_never_pays_without_its_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    class CoreWithout:
        def get_property(self, *_: Any) -> list[str]:
            return ["FP32", "INT8"]

    monkeypatch.setattr(ov, "Core", CoreWithout)
    assert not bf16_pays(HEADS)


@pytest.mark.parametrize("kv_heads", [4, 2], ids=["each-head-its-own-keys", "shared-keys"])
@pytest.mark.parametrize(("fp32_s", "bf16_s", "pays"), [(1.0, 0.7, True), (1.0, 0.95, False)])
def test_bf16_pays_only_where_it_is_clearly_faster(
    monkeypatch: pytest.MonkeyPatch, fp32_s: float, bf16_s: float, pays: bool, kv_heads: int
) -> None:
    taken = iter([fp32_s, bf16_s] * 5)
    capabilities = ["BF16", "FP32"]
    monkeypatch.setattr(ov.Core, "get_property", lambda *_: capabilities)
    monkeypatch.setattr("trivec.backends.openvino.trial.timeit", lambda *_, **__: next(taken))
    spec = AttentionSpec(heads=4, head_dim=32, kv_heads=kv_heads)
    assert bf16_pays(spec, tokens=16) is pays
