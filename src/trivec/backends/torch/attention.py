"""Attention over packed sequences: one interface, several kernels, chosen once with its reason.

`ReferenceAttention` is the plain twin that every other form is tried against, on the device itself,
before it is used. A form knows queries, keys and values; not where they come from.
"""

import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
`[tokens, heads, head_dim]`. Positions are in them already."""

GROUP_STRETCH_MAX = 1.25  # sequences are padded together up to this times the shortest of them


@dataclass(frozen=True, slots=True)
class Spans:
    """Where the sequences of a batch lie, on the device and as the host knows it."""

    cu_seqlens: torch.Tensor  # int32 [sequences + 1]
    lengths: tuple[int, ...]  # [sequences]

    @property
    def length_max(self) -> int:
        return max(self.lengths)


class Attention(Protocol):
    """A way to let each token attend to its own sequence and nothing else."""

    name: str
    is_capturable: bool  # of the host's numbers it uses `length_max` alone, as CUDA graphs need

    def over(self, spans: Spans) -> Attend:
        """What depends on the spans is worked out here, once a batch; the rest, once a layer."""
        ...


class ReferenceAttention:
    """One sequence after the other, scores and softmax in fp32."""

    name = "reference"
    is_capturable = False

    def over(self, spans: Spans) -> Attend:
        def attend(
            q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec
        ) -> torch.Tensor:
            sequences = zip(*(torch.split(one, spans.lengths) for one in (q, k, v)), strict=True)
            parts = [
                _softmax_attention(*(one.float() for one in sequence), spec=spec).to(q.dtype)
                for sequence in sequences
                if len(sequence[0])
            ]
            return torch.cat(parts)

        return attend


def _softmax_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, spec: AttentionSpec
) -> torch.Tensor:
    """softmax(q k' / sqrt(head_dim)) v of one sequence: `[length, heads, head_dim]`."""
    query, key, value = (one.transpose(0, 1) for one in (q, k, v))  # [heads, length, head_dim]
    attended = scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=_seen(len(q), spec, q.device),
        enable_gqa=spec.kv_heads < spec.heads,
    )
    return attended.transpose(0, 1)


def _seen(length: int, spec: AttentionSpec, device: torch.device) -> torch.Tensor | None:
    """Which key (column) a query (row) sees: bool `[length, length]`; None: each sees all."""
    if spec.sees_all:
        return None
    places = torch.arange(length, device=device)
    distance = places[None, :] - places[:, None]
    seen = distance <= 0 if spec.causal else torch.ones_like(distance, dtype=torch.bool)
    return seen if spec.window is None else seen & (distance.abs() <= spec.window)


class GroupedAttention:
    """Sequences of like lengths padded together: for devices and types without a packed kernel.

    Equal lengths are not padded at all. The padding never leaves this form.
    """

    name = "grouped"
    is_capturable = False

    def over(self, spans: Spans) -> Attend:
        groups = [
            _gather_group(group, spans) for group in group_lengths(spans.lengths, GROUP_STRETCH_MAX)
        ]

        def attend(
            q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec
        ) -> torch.Tensor:
            attended = torch.empty(q.shape, dtype=q.dtype, device=q.device)
            for group in groups:
                # each [sequences, heads, longest, head_dim]
                query, key, value = (one[group.places].transpose(1, 2) for one in (q, k, v))
                seen = _seen(group.places.shape[1], spec, q.device)
                if seen is None or group.mask is None:
                    mask = group.mask if seen is None else seen
                else:
                    # Padding sees what a token in its place would: rows without a key are NaN.
                    mask = seen & (group.mask | ~group.mask.transpose(-1, -2))
                rows = scaled_dot_product_attention(
                    query, key, value, attn_mask=mask, enable_gqa=spec.kv_heads < spec.heads
                )
                # [sequences, heads, longest, head_dim] to [sequences * longest, heads, head_dim]
                attended[group.tokens] = rows.transpose(1, 2).flatten(0, 1)[group.real]
            return attended

        return attend


@dataclass(frozen=True, slots=True)
class _Group:
    places: torch.Tensor  # int64 [sequences, longest]: which token stands at each place
    mask: torch.Tensor | None  # bool [sequences, 1, 1, longest]: may a key be seen; None: all may
    real: torch.Tensor  # int64 [tokens of the group]: the places that are no padding, flattened
    tokens: torch.Tensor  # int64 [tokens of the group]: which token of the batch each is


def _gather_group(sequences: Sequence[int], spans: Spans) -> _Group:
    starts = np.concatenate([[0], np.cumsum(spans.lengths)])
    lengths = np.array(spans.lengths)[list(sequences), None]  # [sequences, 1]
    columns = np.arange(lengths.max())
    is_real = columns < lengths  # [sequences, longest]
    places = starts[list(sequences), None] + np.where(is_real, columns, 0)

    def up(array: NDArray[np.generic]) -> torch.Tensor:
        return torch.from_numpy(array).to(spans.cu_seqlens.device)

    mask = None if is_real.all() else up(is_real[:, None, None, :])
    return _Group(up(places), mask, up(np.flatnonzero(is_real)), up(places[is_real]))


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

    *kernel* takes (query, key, value, starts, starts, length_max, length_max), as torch's
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

    def over(self, spans: Spans) -> Attend:
        starts, longest = spans.cu_seqlens, spans.length_max

        def attend(
            q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec
        ) -> torch.Tensor:
            options = {**self._options, **self._options_of(spec)}
            out = self._kernel(q, k, v, starts, starts, longest, longest, **options)
            return out[0] if isinstance(out, tuple) else out

        return attend

    def _options_of(self, spec: AttentionSpec) -> dict[str, object]:
        options: dict[str, object] = {}
        if not spec.sees_all:
            side = -1 if spec.window is None else spec.window
            options["window_size"] = (side, 0 if spec.causal else side)
        if spec.kv_heads < spec.heads and self._is_torch:
            options["enable_gqa"] = True
        return options


PACKED_KERNELS = {
    # name: (module, function), best first on a Hopper
    "flash-attn-3": ("flash_attn_interface", "flash_attn_varlen_func"),
    "varlen": ("torch.nn.attention.varlen", "varlen_attn"),
    "flash-attn-2": ("flash_attn", "flash_attn_varlen_func"),
}


@dataclass(frozen=True, slots=True)
class AttentionChoice:
    """The form to use, and why it and not the ones before it."""

    attention: Attention
    reason: str


def choose_attention(
    asked: str | None, *, trial: Callable[[Attention], str | None], has_packed: bool
) -> AttentionChoice:
    """The first form, fastest first, against which *trial* has nothing to say.

    *trial* runs a form on the device and answers what is wrong with it, or None. *has_packed*
    says whether packed kernels exist for the device and type at all (CUDA at half precision).
    """
    reasons: list[str] = []
    for name in (asked,) if asked is not None else (*PACKED_KERNELS, "grouped"):
        if name in PACKED_KERNELS and not has_packed and asked is None:
            continue
        forms = forms_named(name)
        if not forms:
            reasons.append(f"not {name}: {name} is not installed")
        for form in forms:
            wrong = trial(form)
            if wrong is None:
                return AttentionChoice(form, "; ".join([form.name, *reasons]))
            reasons.append(f"not {form.name}: {wrong}")
    return AttentionChoice(ReferenceAttention(), "; ".join(["reference", *reasons]))


def forms_named(name: str) -> tuple[Attention, ...]:
    """What is called *name*, in the order to try; nothing where its package is not installed."""
    if name == "reference":
        return (ReferenceAttention(),)
    if name == "grouped":
        return (GroupedAttention(),)
    module, function = PACKED_KERNELS[name]
    try:
        return packed_forms(name, getattr(importlib.import_module(module), function))
    except (ImportError, AttributeError):
        return ()


def packed_forms(name: str, kernel: Callable[..., object]) -> tuple[Attention, ...]:
    """*kernel* told not to split keys where it knows the word; torch's own also untold.

    Splitting the keys of a sequence depends on its neighbours, and a sequence must keep its bits in
    any company. Versions without the word never split. Torch's `varlen_attn` knows it since 2.12
    and refuses it wherever it runs FlashAttention 2, which splits the keys of a lone query only.
    """
    if "num_splits" not in inspect.signature(kernel).parameters:
        return (PackedAttention(name, kernel),)
    told = PackedAttention(name, kernel, num_splits=1)
    if name != "varlen":
        return (told,)
    return (told, PackedAttention(f"{name} (no num_splits)", kernel))
