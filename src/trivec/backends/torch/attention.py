"""Attention over packed sequences: several kernels behind one interface, chosen by a check at start.

Kernels differ by device, driver and version, so each is compared on the device itself with
`ReferenceAttention`, its plain twin, before it is used.
"""

import importlib
import inspect
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import scaled_dot_product_attention

from trivec.models.ops import AttentionSpec

Attend: TypeAlias = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, AttentionSpec], torch.Tensor
]
"""From queries `[tokens, heads, head_dim]`, and keys and values `[tokens, kv_heads, head_dim]`, to
`[tokens, heads, head_dim]`. Rotary positions are applied already."""

GROUP_STRETCH_MAX = 1.25  # sequences are padded together up to this times the shortest of them
# Queries at a time where a mask or scores are written out: at 8,192 keys and 16 heads 134 MB of
# fp32 scores, not 4.3 GB. On a CPU also the fastest of 64 to 512 for a causal text of 2,048 tokens.
QUERY_BLOCK = 256

CHECK_LENGTHS = (1, 2, 63, 64, 65, 300)  # around the edges of kernels' blocks
COSINE_MIN = {torch.float32: 0.999999, torch.bfloat16: 0.9995, torch.float16: 0.9995}
# What a kernel that is missing, refused or miscompiled raises, through torch, Triton or flash-attn.
REFUSALS = (RuntimeError, TypeError, ValueError, AssertionError, ImportError, AttributeError)

PACKED_KERNELS = {
    # name: (module, function), best first on a Hopper
    "flash-attn-3": ("flash_attn_interface", "flash_attn_varlen_func"),
    "varlen": ("torch.nn.attention.varlen", "varlen_attn"),
    "flash-attn-2": ("flash_attn", "flash_attn_varlen_func"),
}


class Attention(Protocol):
    """A kernel by which each token attends to its own sequence and to nothing else."""

    name: str
    is_capturable: bool  # by CUDA graphs: of *lengths* it uses the maximum alone

    def plan(self, cu_seqlens: torch.Tensor, lengths: tuple[int, ...]) -> Attend:
        """Prepare for a batch, once for all its layers: int32 `[sequences + 1]` on the device, and
        the lengths `[sequences]` as the host knows them.
        """
        ...


class ReferenceAttention:
    """One sequence after the other, scores and softmax in fp32."""

    name = "reference"
    is_capturable = False

    def plan(self, cu_seqlens: torch.Tensor, lengths: tuple[int, ...]) -> Attend:
        def attend(
            q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec
        ) -> torch.Tensor:
            rows = []
            for sequence in zip(*(torch.split(one, lengths) for one in (q, k, v)), strict=True):
                if len(sequence[0]):
                    # each [heads, length, head_dim]: of three axes, sdpa writes the scores out
                    heads = (one.float().transpose(0, 1) for one in sequence)
                    attended = _attend(*heads, spec=spec, query_block=QUERY_BLOCK)
                    rows.append(attended.transpose(0, 1).to(q.dtype))
            return torch.cat(rows)

        return attend


class GroupedAttention:
    """Sequences of like lengths padded together: for devices and types without a packed kernel.

    Equal lengths are not padded at all. The padding never leaves this class.
    """

    name = "grouped"
    is_capturable = False

    def plan(self, cu_seqlens: torch.Tensor, lengths: tuple[int, ...]) -> Attend:
        def upload(array: NDArray[np.generic]) -> torch.Tensor:
            return torch.from_numpy(array).to(cu_seqlens.device)

        starts = np.concatenate([[0], np.cumsum(lengths)])
        groups = []
        for sequences in group_lengths(lengths, GROUP_STRETCH_MAX):
            own_lengths = np.array(lengths)[sequences, None]  # [sequences, 1]
            columns = np.arange(own_lengths.max())
            is_token = columns < own_lengths  # [sequences, longest]
            tokens = starts[sequences, None] + np.where(is_token, columns, 0)
            mask = None if is_token.all() else upload(is_token[:, None, None])
            unpadded = upload(np.flatnonzero(is_token))
            groups.append((upload(tokens), unpadded, upload(tokens[is_token]), mask))

        def attend(
            q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec
        ) -> torch.Tensor:
            attended = torch.empty(q.shape, dtype=q.dtype, device=q.device)
            for places, unpadded, tokens, mask in groups:
                # each [sequences, heads, longest, head_dim]
                padded = (one[places].transpose(1, 2) for one in (q, k, v))
                query_block = places.shape[1] if spec.sees_all else QUERY_BLOCK
                rows = _attend(*padded, spec=spec, query_block=query_block, is_token=mask)
                attended[tokens] = rows.transpose(1, 2).flatten(0, 1)[unpadded]
            return attended

        return attend


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    spec: AttentionSpec,
    query_block: int,
    is_token: torch.Tensor | None = None,
) -> torch.Tensor:
    """softmax(q k' / sqrt(head_dim)) v: each `[…, heads, length, head_dim]`, *query_block* rows at a
    time and over the keys that they may see. *is_token*, bool `[sequences, 1, 1, length]`, is False
    at padding; None: there is none.
    """
    length = q.shape[-2]
    reach = length if spec.window is None else spec.window
    rows = []
    for start in range(0, length, query_block):
        end = min(start + query_block, length)
        first, last = max(start - reach, 0), end if spec.causal else min(end + reach, length)
        seen = None if is_token is None else is_token[..., first:last]
        if not spec.sees_all:
            queries = torch.arange(start, end, device=q.device)[:, None]
            keys = torch.arange(first, last, device=q.device)
            in_reach = (keys - queries).abs() <= reach  # [queries, keys]
            if spec.causal:
                in_reach &= keys <= queries
            if is_token is not None:
                # Padding sees what a token in its place would: rows without a key are NaN.
                in_reach = in_reach & (seen | ~is_token[..., start:end].transpose(-1, -2))
            seen = in_reach
        rows.append(
            scaled_dot_product_attention(
                q[..., start:end, :],
                k[..., first:last, :],
                v[..., first:last, :],
                attn_mask=seen,
                enable_gqa=spec.kv_heads < spec.heads,
            )
        )
    return rows[0] if len(rows) == 1 else torch.cat(rows, dim=-2)


def group_lengths(lengths: Sequence[int], stretch_max: float) -> list[list[int]]:
    """Sequence indices in groups whose longest is at most *stretch_max* times its shortest."""
    groups: list[list[int]] = []
    shortest = 0
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if lengths[i] == 0:
            continue
        if not groups or lengths[i] > shortest * stretch_max:
            groups.append([])
            shortest = lengths[i]
        groups[-1].append(i)
    return groups


class PackedAttention:
    """A kernel that reads packed queries, keys and values and where the sequences start.

    *kernel* takes (query, key, value, cu_seqlens, cu_seqlens, length_max, length_max), as torch's
    `varlen_attn` and flash-attn's `flash_attn_varlen_func` both do; both return `[tokens, heads,
    head_dim]`, some versions as the first of several. Both take `window_size`, and fewer heads of
    keys and values, torch's only when told so.
    """

    is_capturable = True

    def __init__(self, name: str, kernel: Callable[..., object], **options: int) -> None:
        self.name = name
        self._kernel = kernel
        self._options = options
        self._is_torch = name.startswith("varlen")

    def plan(self, cu_seqlens: torch.Tensor, lengths: tuple[int, ...]) -> Attend:
        length_max = max(lengths)

        def attend(
            q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec
        ) -> torch.Tensor:
            options: dict[str, object] = dict(self._options)
            if not spec.sees_all:
                side = -1 if spec.window is None else spec.window
                options["window_size"] = (side, 0 if spec.causal else side)
            if spec.kv_heads < spec.heads and self._is_torch:
                options["enable_gqa"] = True
            out = self._kernel(q, k, v, cu_seqlens, cu_seqlens, length_max, length_max, **options)
            return out[0] if isinstance(out, tuple) else out

        return attend


def kernels_named(name: str) -> tuple[Attention, ...]:
    """The forms of kernel *name* in the order to try; none where its package is not installed.

    Splitting the keys of a sequence over blocks depends on its neighbours, and a sequence must keep
    its bits beside any others: a kernel that knows `num_splits` is told 1; versions without the
    word never split. Torch's `varlen_attn` knows it since 2.12 and refuses it wherever it runs
    FlashAttention 2, which splits the keys of a lone query only: it is also tried without.
    """
    if name == "reference":
        return (ReferenceAttention(),)
    if name == "grouped":
        return (GroupedAttention(),)
    module, function = PACKED_KERNELS[name]
    try:
        kernel = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError):
        return ()
    if "num_splits" not in inspect.signature(kernel).parameters:
        return (PackedAttention(name, kernel),)
    unsplit = PackedAttention(name, kernel, num_splits=1)
    if name != "varlen":
        return (unsplit,)
    return (unsplit, PackedAttention(f"{name} (no num_splits)", kernel))


def choose_attention(
    asked: str | None,
    specs: Sequence[AttentionSpec],
    *,
    dtype: torch.dtype,
    device: torch.device,
    has_packed: bool,
) -> tuple[Attention, str]:
    """The first kernel, fastest first, that computes *specs* as the reference does; and why it.

    *has_packed*: packed kernels exist for the device and type (CUDA at half precision).
    """
    reasons: list[str] = []
    for name in (asked,) if asked is not None else (*PACKED_KERNELS, "grouped"):
        if name in PACKED_KERNELS and not has_packed and asked is None:
            continue
        kernels = kernels_named(name)
        if not kernels:
            reasons.append(f"not {name}: {name} is not installed")
        for kernel in kernels:
            faults = (_fault_of(kernel, spec, dtype=dtype, device=device) for spec in specs)
            fault = next((one for one in faults if one is not None), None)
            if fault is None:
                return kernel, "; ".join([kernel.name, *reasons])
            reasons.append(f"not {kernel.name}: {fault}")
    return ReferenceAttention(), "; ".join(["reference", *reasons])


def _fault_of(
    kernel: Attention, spec: AttentionSpec, *, dtype: torch.dtype, device: torch.device
) -> str | None:
    """What is wrong with *kernel* on random rows, the same at every start, as LayerNorm leaves."""
    cu_seqlens = torch.tensor([0, *accumulate(CHECK_LENGTHS)], dtype=torch.int32, device=device)
    heads = [spec.heads, spec.kv_heads, spec.kv_heads]
    shape = (sum(CHECK_LENGTHS), sum(heads), spec.head_dim)
    rows = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    q, k, v = rows.split(heads, dim=1)
    return fault_of(
        lambda: kernel.plan(cu_seqlens, CHECK_LENGTHS)(q, k, v, spec),
        lambda: ReferenceAttention().plan(cu_seqlens, CHECK_LENGTHS)(q, k, v, spec),
    )


def fault_of(fast: Callable[[], torch.Tensor], plain: Callable[[], torch.Tensor]) -> str | None:
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
