"""From hidden states to vectors on the device, in fp32: what `models/pooling.py` does in numpy.

Nothing here waits for the device: every shape is known on the host before a kernel is launched.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional

from trivec.backends.torch.encoder import Packed
from trivec.models.pooling import Pooling


@dataclass(frozen=True, slots=True)
class Head:
    """A linear layer on hidden states."""

    weight: torch.Tensor  # [out, in]
    bias: torch.Tensor  # [out]

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        return functional.linear(rows, self.weight, self.bias)


@dataclass(frozen=True, slots=True)
class SparseRows:
    """The best weight of each distinct token of each sequence, in slots; unused slots weigh 0.

    A slot's key is sequence * vocabulary + token id, and keys ascend over the used slots.
    """

    keys: torch.Tensor  # int64 [rows]
    weights: torch.Tensor  # fp32 [rows]


@dataclass(frozen=True, slots=True)
class DeviceHeads:
    pooling: Pooling
    normalize: bool
    vocabulary_size: int
    sparse: Head | None  # fp32, to 1 column
    multi: Head | None  # fp32, to the multi-vectors' columns
    ignored_token_ids: torch.Tensor | None  # int32: never in a sparse vector

    def dense(self, hidden: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
        """One row a sequence: fp32 `[sequences, hidden]`."""
        if self.pooling is Pooling.CLS:
            pooled = hidden[starts[:-1]].float()
        elif self.pooling is Pooling.LAST:
            pooled = hidden[starts[1:] - 1].float()
        else:
            # `unsafe` leaves out a check of the offsets that would wait for the device.
            pooled = torch.segment_reduce(
                hidden.float(), "mean", offsets=starts.long(), axis=0, unsafe=True
            )
        return functional.normalize(pooled, dim=-1) if self.normalize else pooled

    def best_weights(self, hidden: torch.Tensor, packed: Packed, rows: torch.Tensor) -> SparseRows:
        """relu(H W' + b) of the tokens *rows*, the maximum a token id, by sorting the ids."""
        assert self.sparse is not None
        assert self.ignored_token_ids is not None
        weights = torch.relu(self.sparse(hidden[rows].float()))[:, 0]
        token_ids = packed.token_ids[rows]
        weights = weights.masked_fill(torch.isin(token_ids, self.ignored_token_ids), 0.0)
        keys = packed.owners[rows].long() * self.vocabulary_size + token_ids
        keys, order = torch.sort(keys)
        is_new = torch.ones_like(keys)
        is_new[1:] = keys[1:] != keys[:-1]
        slots = torch.cumsum(is_new, 0) - 1
        best = torch.zeros_like(weights).scatter_reduce(0, slots, weights[order], "amax")
        return SparseRows(torch.zeros_like(keys).scatter_(0, slots, keys), best)

    def token_vectors(self, hidden: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """H W' + b of the tokens *rows*, each of length 1: fp32 `[rows, dimensions]`."""
        assert self.multi is not None
        return functional.normalize(self.multi(hidden[rows].float()), dim=-1)
