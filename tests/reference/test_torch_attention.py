# ruff: noqa: E402 - what is imported below needs what is asked for above it
"""Attention kernels on packed sequences: equal to the formula and to each other, chosen by a check."""

import math
import sys
from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

torch = pytest.importorskip("torch", reason="the torch backend needs torch")
pytest.importorskip("transformers", reason="the reference is transformers")

from tests.reference.torch_checkpoint import varlen_on_cpu

from trivec.backends.torch import attention as attention_module
from trivec.backends.torch.attention import (
    PLAIN_KERNELS,
    QUERY_BLOCK,
    REFERENCE,
    Attention,
    choose_attention,
    fault_of,
    kernels_named,
    packed_attention,
)
from trivec.models.ops import Alibi, AttentionSpec

pytestmark = pytest.mark.reference

GROUPED = PLAIN_KERNELS["grouped"]
SPECS = {
    "all-see-all": AttentionSpec(4, 16, 4),
    "causal": AttentionSpec(4, 16, 4, causal=True),
    "window": AttentionSpec(4, 16, 4, window=5),
    "wide-window": AttentionSpec(4, 16, 4, window=300),
    "causal-window": AttentionSpec(4, 16, 4, causal=True, window=40),
    "grouped-queries": AttentionSpec(4, 16, 2),
    "causal-grouped-queries": AttentionSpec(4, 16, 2, causal=True),
}
LENGTHS = (1, 30, 33, 30, 30, 0, 200, 31, 2, QUERY_BLOCK, QUERY_BLOCK + 1, 700, 690)
LIKE = torch.empty(0)


def hidden_from(spec: AttentionSpec, length: int) -> NDArray[np.bool_]:
    """Which key (column) a query (row) does not see: bool `[length, length]`."""
    distance = np.arange(length)[None, :] - np.arange(length)[:, None]
    hidden = np.zeros((length, length), np.bool_)
    if spec.causal:
        hidden |= distance > 0
    if spec.window is not None:
        hidden |= np.abs(distance) > spec.window
    return hidden


def packed_rows(lengths: tuple[int, ...], spec: AttentionSpec) -> tuple[Any, list[Any]]:
    """`cu_seqlens`, and random queries, keys and values."""
    heads = [spec.heads, spec.kv_heads, spec.kv_heads]
    shape = (sum(lengths), sum(heads), spec.head_dim)
    rows = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    return cu_seqlens, list(rows.split(heads, dim=1))


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize(
    "kernel",
    [
        pytest.param(REFERENCE, id="reference"),
        pytest.param(GROUPED, id="grouped"),
        pytest.param(packed_attention("varlen", varlen_on_cpu, num_splits=1), id="packed"),
    ],
)
def test_every_kernel_computes_the_formula(kernel: Attention, spec: AttentionSpec) -> None:
    """softmax(q k' / sqrt(head_dim)) v within each sequence, in fp64 with a full mask."""
    cu_seqlens, (q, k, v) = packed_rows(LENGTHS, spec)
    found = kernel.plan(cu_seqlens, LENGTHS)(q, k, v, spec)
    own_head = torch.arange(spec.heads) // (spec.heads // spec.kv_heads)
    for first, last in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        query, key, value = (
            one[first:last].double().transpose(0, 1) for one in (q, k[:, own_head], v[:, own_head])
        )
        scores = query @ key.transpose(1, 2) / math.sqrt(spec.head_dim)
        scores[:, torch.from_numpy(hidden_from(spec, last - first))] = -torch.inf
        expected = (torch.softmax(scores, -1) @ value).transpose(0, 1).float()
        torch.testing.assert_close(found[first:last], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kernel", [REFERENCE, GROUPED], ids=lambda one: one.name)
@pytest.mark.parametrize("masked", ["all-see-all", "causal", "window", "grouped-queries"])
def test_a_bias_by_distance_is_added_to_the_scores(kernel: Attention, masked: str) -> None:
    """Against the formula with the whole bias written out; beyond its reach the last number holds."""
    reach = 300
    spec = SPECS[masked]
    bias = torch.randn((spec.heads, 2 * reach + 1), generator=torch.Generator().manual_seed(5))
    cu_seqlens, (q, k, v) = packed_rows(LENGTHS, spec)
    found = kernel.plan(cu_seqlens, LENGTHS)(q, k, v, spec, bias)
    own_head = torch.arange(spec.heads) // (spec.heads // spec.kv_heads)
    for first, last in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        query, key, value = (
            one[first:last].double().transpose(0, 1) for one in (q, k[:, own_head], v[:, own_head])
        )
        places = torch.arange(last - first)
        distances = (places[None, :] - places[:, None]).clamp(-reach, reach)
        scores = query @ key.transpose(1, 2) / math.sqrt(spec.head_dim)
        scores += bias.double()[:, distances + reach]
        scores[:, torch.from_numpy(hidden_from(spec, last - first))] = -torch.inf
        expected = (torch.softmax(scores, -1) @ value).transpose(0, 1).float()
        torch.testing.assert_close(found[first:last], expected, atol=1e-5, rtol=0)


def test_a_packed_kernel_is_not_taken_for_scores_with_a_bias(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = SimpleNamespace(varlen_attn=varlen_on_cpu)
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", module)
    spec = AttentionSpec(4, 16, 4, bias=Alibi(4, 600))
    kernel, reason = choose_attention(None, [spec], like=LIKE, has_packed=True)
    assert kernel is GROUPED
    assert "not varlen: it raised ValueError: scores cannot be given a bias by distance" in reason


@pytest.mark.parametrize("kernel", [REFERENCE, GROUPED], ids=lambda one: one.name)
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_scores_and_masks_are_made_for_a_block_of_queries(
    kernel: Attention, spec: AttentionSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that memory grows with the length, not with its square, and keys out of reach are skipped."""
    calls: list[tuple[int, int, Any]] = []
    plain = torch.nn.functional.scaled_dot_product_attention

    def watched(query: Any, key: Any, value: Any, *, attn_mask: Any, enable_gqa: bool) -> Any:
        calls.append((query.shape[-2], key.shape[-2], attn_mask))
        return plain(query, key, value, attn_mask=attn_mask, enable_gqa=enable_gqa)

    monkeypatch.setattr(attention_module, "scaled_dot_product_attention", watched)
    length = 4 * QUERY_BLOCK + 7
    cu_seqlens, (q, k, v) = packed_rows((length,), spec)
    kernel.plan(cu_seqlens, (length,))(q, k, v, spec)
    for query_count, key_count, mask in calls:
        if kernel is REFERENCE or mask is not None:
            assert query_count <= QUERY_BLOCK
        if spec.window is not None:
            assert key_count <= query_count + 2 * spec.window
    if spec.sees_all:
        assert all(mask is None for _, _, mask in calls)


def test_grouped_attention_pads_like_lengths_together(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []

    def watched(query: Any, _key: Any, _value: Any, **_: object) -> Any:
        shapes.append((query.shape[0], query.shape[2]))
        return query

    monkeypatch.setattr(attention_module, "scaled_dot_product_attention", watched)
    spec, lengths = SPECS["all-see-all"], (10, 100, 12, 0, 99, 13, 1)
    cu_seqlens, (q, k, v) = packed_rows(lengths, spec)
    GROUPED.plan(cu_seqlens, lengths)(q, k, v, spec)
    assert shapes == [(1, 1), (2, 12), (1, 13), (2, 100)], "[sequences, longest] of each group"


@pytest.mark.parametrize(
    ("refused", "chosen"),
    [
        pytest.param({}, "flash-attn-3", id="takes-the-fastest-that-is-there"),
        pytest.param({"flash-attn-3": "no such device"}, "varlen", id="then-torch-s-own"),
        pytest.param(
            {"flash-attn-3": "x", "varlen": "wrong numbers", "flash-attn-2": "y"},
            "grouped",
            id="then-the-padded-form",
        ),
    ],
)
def test_attention_is_chosen_by_a_check_and_says_why(
    monkeypatch: pytest.MonkeyPatch, refused: dict[str, str], chosen: str
) -> None:
    def named(name: str) -> tuple[Attention, ...]:
        if name == "grouped":
            return (GROUPED,)

        def kernel(*arguments: Any, **options: Any) -> object:
            if name in refused:
                raise RuntimeError(refused[name])
            return varlen_on_cpu(*arguments, num_splits=1, **options)

        return (packed_attention(name, kernel),)

    monkeypatch.setattr(attention_module, "kernels_named", named)
    kernel, reason = choose_attention(None, list(SPECS.values())[:4], like=LIKE, has_packed=True)
    assert kernel.name == chosen
    assert reason.startswith(chosen)
    for name, why in refused.items():
        assert f"not {name}: it raised RuntimeError: {why}" in reason


def varlen_of_flash_attention_2(
    *arguments: Any, num_splits: int | None = None, **options: Any
) -> object:
    """Stock torch 2.13: the word is known, and refused by the only kernel that is built in."""
    if num_splits is not None:
        raise RuntimeError("num_splits requires FA3. Register FA3 first")
    return varlen_on_cpu(*arguments, num_splits=1, **options)


def test_torch_s_own_kernel_is_kept_where_it_refuses_to_be_told_of_splits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = SimpleNamespace(varlen_attn=varlen_of_flash_attention_2)
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", module)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)
    kernel, reason = choose_attention(None, [SPECS["causal"]], like=LIKE, has_packed=True)
    assert kernel.name == "varlen (no num_splits)"
    assert kernel.is_capturable
    assert "not flash-attn-3: flash-attn-3 is not installed" in reason
    assert "not varlen: it raised RuntimeError: num_splits requires FA3" in reason


def test_a_kernel_that_may_split_keys_is_never_run_untold(monkeypatch: pytest.MonkeyPatch) -> None:
    module = SimpleNamespace(flash_attn_varlen_func=varlen_of_flash_attention_2)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", module)
    assert [kernel.name for kernel in kernels_named("flash-attn-3")] == ["flash-attn-3"]
    kernel, reason = choose_attention("flash-attn-3", [SPECS["causal"]], like=LIKE, has_packed=True)
    assert kernel is REFERENCE
    assert "not flash-attn-3: it raised RuntimeError: num_splits requires FA3" in reason


def test_a_device_without_packed_kernels_never_tries_them(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []

    def named(name: str) -> tuple[Attention, ...]:
        tried.append(name)
        return (GROUPED,)

    monkeypatch.setattr(attention_module, "kernels_named", named)
    choose_attention(None, [SPECS["causal"]], like=LIKE, has_packed=False)
    assert tried == ["grouped"]


def test_a_check_says_what_is_wrong_with_a_fast_path() -> None:
    plain = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))

    def raises() -> object:
        raise RuntimeError("no kernel image\nfor this device")

    assert fault_of(plain.clone, lambda: plain) is None
    assert fault_of(raises, lambda: plain) == "it raised RuntimeError: no kernel image"
    assert "minimum cosine -" in str(fault_of(lambda: -plain, lambda: plain))
    assert "shape" in str(fault_of(lambda: plain[:3], lambda: plain))
    assert "cosine" in str(fault_of(lambda: plain * torch.nan, lambda: plain))
