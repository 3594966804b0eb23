"""Attention over packed sequences: several kernels behind one interface, chosen by a check at start.

Kernels differ by device, driver and version, so each is compared with `REFERENCE`, a plain implementation,
on the device itself before it is used.
"""

import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from trivec.models.ops import AttentionSpec


class Attend(Protocol):
    """From queries `[tokens, heads, head_dim]`, and keys and values `[tokens, kv_heads, head_dim]`,
    to `[tokens, heads, head_dim]`. Rotary positions are applied already; *bias*, fp32 `[heads, 2 *
    reach + 1]`, is what scores gain by the distance of a key from its query, from -reach on.
    """

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, bias: Tensor | None = None
    ) -> Tensor: ...


GROUP_STRETCH_MAX = 1.25  # sequences are padded together up to this times the shortest of them
# Queries at a time where a mask or scores are written out: at 8,192 keys and 16 heads 134 MB of
# fp32 scores, not 4.3 GB. On a CPU also the fastest of 64 to 512 for a causal text of 2,048 tokens.
QUERY_BLOCK = 256

CHECK_LENGTHS = (1, 2, 63, 64, 65, 300)  # around the edges of kernels' blocks
CHECK_REACH = 128  # of a bias by distance
COSINE_MIN = {torch.float32: 0.999999, torch.bfloat16: 0.9995, torch.float16: 0.9995}
# What a kernel that is missing, refused or miscompiled raises, through torch, Triton or flash-attn.
REFUSALS = (RuntimeError, TypeError, ValueError, AssertionError, ImportError, AttributeError)

PACKED_KERNELS = {
    # name: (module, function), best first on a Hopper
    "flash-attn-3": ("flash_attn_interface", "flash_attn_varlen_func"),
    "varlen": ("torch.nn.attention.varlen", "varlen_attn"),
    "flash-attn-2": ("flash_attn", "flash_attn_varlen_func"),
}


@dataclass(frozen=True, slots=True)
class Attention:
    """A kernel by which each token attends to its own sequence and to nothing else.

    `plan` prepares it for a batch, once for all layers: from `cu_seqlens`, int32 `[sequences + 1]`
    on the device, and the lengths `[sequences]`, known to the host.
    """

    name: str
    plan: Callable[[Tensor, tuple[int, ...]], Attend]
    is_capturable: bool = False  # by CUDA graphs: of the lengths it uses the maximum alone


def plan_reference(cu_seqlens: Tensor, lengths: tuple[int, ...]) -> Attend:
    """One sequence after the other, scores and softmax in fp32."""

    def attend(
        q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, bias: Tensor | None = None
    ) -> Tensor:
        rows = []
        for sequence in zip(*(torch.split(one, lengths) for one in (q, k, v)), strict=True):
            if len(sequence[0]):
                # each [heads, length, head_dim]: given three axes, sdpa writes the scores out
                query, key, value = (one.float().transpose(0, 1) for one in sequence)
                attended = _attend(query, key, value, spec, bias, block=QUERY_BLOCK, is_token=None)
                rows.append(attended.transpose(0, 1).to(q.dtype))
        return torch.cat(rows)

    return attend


def plan_grouped(
    cu_seqlens: Tensor, lengths: tuple[int, ...], seen_lengths: tuple[int, ...] = ()
) -> Attend:
    """Sequences of like lengths padded together: for devices and types without a packed kernel.

    Equal lengths are not padded at all, and the padding never leaves this function. *seen_lengths*:
    so many leading tokens of each sequence are attended to; none: all are.
    """

    def upload(array: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(array).to(cu_seqlens.device)

    members: list[list[int]] = []  # sequences by group
    for i in sorted(np.flatnonzero(lengths).tolist(), key=lengths.__getitem__):
        if not members or lengths[i] > lengths[members[-1][0]] * GROUP_STRETCH_MAX:
            members.append([])
        members[-1].append(i)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    groups = []
    for sequences in members:
        own_lengths = np.array(lengths)[sequences, None]  # [sequences, 1]
        columns = np.arange(own_lengths.max())
        is_token = columns < own_lengths  # [sequences, longest]
        places = starts[sequences, None] + np.where(is_token, columns, 0)  # [sequences, longest]
        is_seen = is_token
        if seen_lengths:
            is_seen = columns < np.array(seen_lengths)[sequences, None]
        mask = None if is_seen.all() else upload(is_seen[:, None, None])
        unpadded = upload(np.flatnonzero(is_token))
        groups.append((upload(places), unpadded, upload(places[is_token]), mask))

    def attend(
        q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, bias: Tensor | None = None
    ) -> Tensor:
        attended = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        for places, unpadded, tokens, is_token in groups:
            # each [sequences, heads, longest, head_dim]
            query, key, value = (one[places].transpose(1, 2) for one in (q, k, v))
            block = places.shape[1] if spec.sees_all and bias is None else QUERY_BLOCK
            rows = _attend(query, key, value, spec, bias, block=block, is_token=is_token)
            attended[tokens] = rows.transpose(1, 2).flatten(0, 1)[unpadded]
        return attended

    return attend


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: AttentionSpec,
    bias: Tensor | None,
    *,
    block: int,
    is_token: Tensor | None,
) -> Tensor:
    """softmax(q k' / sqrt(head_dim) + bias) v: each `[…, heads, length, head_dim]`, *block* queries at a
    time, over the keys that they may see. *is_token*, bool `[sequences, 1, 1, length]`, is False at
    padding; None: there is none.
    """
    length = q.shape[-2]
    reach = length if spec.window is None else spec.window
    rows = []
    for start in range(0, length, block):
        end = min(start + block, length)
        first, last = max(start - reach, 0), end if spec.causal else min(end + reach, length)
        mask = None if is_token is None else is_token[..., first:last]
        queries = torch.arange(start, end, device=q.device)[:, None]
        distances = torch.arange(first, last, device=q.device) - queries  # [queries, keys]
        if not spec.sees_all:
            in_reach = distances.abs() <= reach
            if spec.causal:
                in_reach &= distances <= 0
            if is_token is not None:
                # Padding sees what a token in its place would: rows without a key are NaN.
                in_reach = in_reach & (mask | ~is_token[..., start:end].transpose(-1, -2))
            mask = in_reach
        if bias is not None:
            farthest = bias.shape[1] // 2
            gains = bias[:, distances.clamp(-farthest, farthest) + farthest].to(q.dtype)
            mask = gains if mask is None else gains.masked_fill(~mask, -torch.inf)
        some = (q[..., start:end, :], k[..., first:last, :], v[..., first:last, :])
        has_groups = spec.kv_heads < spec.heads
        rows.append(scaled_dot_product_attention(*some, attn_mask=mask, enable_gqa=has_groups))
    return rows[0] if len(rows) == 1 else torch.cat(rows, dim=-2)


def packed_attention(name: str, kernel: Callable[..., object], **options: int) -> Attention:
    """A *kernel* that reads packed queries, keys and values and where the sequences start.

    It takes (query, key, value, cu_seqlens, cu_seqlens, length_max, length_max), as torch's
    `varlen_attn` and flash-attn's `flash_attn_varlen_func` both do; both return `[tokens, heads,
    head_dim]`, some versions as the first of several. Both take `window_size`, and fewer heads of
    keys and values, torch's only when told so.
    """

    def plan(cu_seqlens: Tensor, lengths: tuple[int, ...]) -> Attend:
        length_max = max(lengths)

        def attend(
            q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, bias: Tensor | None = None
        ) -> Tensor:
            if bias is not None:
                raise ValueError("scores cannot be given a bias by distance")
            own: dict[str, object] = dict(options)
            if not spec.sees_all:
                side = -1 if spec.window is None else spec.window
                own["window_size"] = (side, 0 if spec.causal else side)
            if spec.kv_heads < spec.heads and name.startswith("varlen"):
                own["enable_gqa"] = True
            out = kernel(q, k, v, cu_seqlens, cu_seqlens, length_max, length_max, **own)
            return out[0] if isinstance(out, tuple) else out

        return attend

    return Attention(name, plan, is_capturable=True)


REFERENCE = Attention("reference", plan_reference)
PLAIN_KERNELS = {"reference": REFERENCE, "grouped": Attention("grouped", plan_grouped)}


def kernels_named(name: str) -> tuple[Attention, ...]:
    """The forms of kernel *name* in the order to try; none where its package is not installed.

    Splitting the keys of a sequence over blocks depends on its neighbours, and a sequence must keep
    its bits beside any others: a kernel that knows `num_splits` is told 1; versions without the
    word never split. Torch's `varlen_attn` knows it since 2.12 and refuses it wherever it runs
    FlashAttention 2, which splits the keys of a lone query only: it is also tried without.
    """
    if name in PLAIN_KERNELS:
        return (PLAIN_KERNELS[name],)
    module, function = PACKED_KERNELS[name]
    try:
        kernel = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError):
        return ()
    if "num_splits" not in inspect.signature(kernel).parameters:
        return (packed_attention(name, kernel),)
    unsplit = packed_attention(name, kernel, num_splits=1)
    if name != "varlen":
        return (unsplit,)
    return (unsplit, packed_attention(f"{name} (no num_splits)", kernel))


def choose_attention(
    asked: str | None, specs: Sequence[AttentionSpec], *, like: Tensor, has_packed: bool
) -> tuple[Attention, str]:
    """The first kernel, fastest first, that computes *specs* as the reference does; and why it.

    *like* is a tensor of the type and device to run on; *has_packed*: packed kernels exist for them
    (CUDA at half precision).
    """
    cu_seqlens = torch.tensor([0, *accumulate(CHECK_LENGTHS)], dtype=torch.int32).to(like.device)

    def fault_for(kernel: Attention, spec: AttentionSpec) -> str | None:
        heads = [spec.heads, spec.kv_heads, spec.kv_heads]
        shape = (sum(CHECK_LENGTHS), sum(heads), spec.head_dim)
        draw = torch.Generator().manual_seed(0)
        rows = torch.randn(shape, generator=draw).to(like)
        q, k, v = rows.split(heads, dim=1)  # as LayerNorm leaves them, the same at every start
        bias = None
        if spec.bias is not None:
            bias = torch.randn((spec.heads, 2 * CHECK_REACH + 1), generator=draw).to(like.device)
        return fault_of(
            lambda: kernel.plan(cu_seqlens, CHECK_LENGTHS)(q, k, v, spec, bias),
            lambda: REFERENCE.plan(cu_seqlens, CHECK_LENGTHS)(q, k, v, spec, bias),
        )

    reasons: list[str] = []
    automatic = (*(PACKED_KERNELS if has_packed else ()), "grouped")
    for name in automatic if asked is None else (asked,):
        kernels = kernels_named(name)
        if not kernels:
            reasons.append(f"not {name}: {name} is not installed")
        for kernel in kernels:
            faults = (fault_for(kernel, spec) for spec in dict.fromkeys(specs))
            fault = next((one for one in faults if one is not None), None)
            if fault is None:
                return kernel, "; ".join([kernel.name, *reasons])
            reasons.append(f"not {kernel.name}: {fault}")
    return REFERENCE, "; ".join(["reference", *reasons])


def fault_of(fast: Callable[[], Tensor], plain: Callable[[], Tensor]) -> str | None:
    """Why *fast* cannot stand for *plain*, comparing their rows `[rows, …]`; None where it can."""
    expected = plain()
    try:
        found = fast()
    except REFUSALS as error:
        return summary_of(error)
    if found.shape != expected.shape:
        return f"its shape is {tuple(found.shape)}, not {tuple(expected.shape)}"
    cosines = torch.cosine_similarity(found.double().flatten(1), expected.double().flatten(1))
    cosine_min = float(cosines.nan_to_num(-1).min())
    if cosine_min < COSINE_MIN[expected.dtype]:
        return f"its rows differ from the plain form's: minimum cosine {cosine_min:.6f}"
    return None


def summary_of(error: BaseException) -> str:
    """The type of *error* and the start of its message: drivers and compilers write pages."""
    first_sentence = str(error).partition("\n")[0].partition(". ")[0]
    return f"it raised {type(error).__name__}: {first_sentence[:160]}"
