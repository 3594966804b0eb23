"""Pooling: how the last hidden states of a sequence become its dense vector."""

from enum import Enum


class Pooling(Enum):
    """Of which tokens the dense vector is made."""

    CLS = "cls"  # the first token's
    MEAN = "mean"  # the mean over all tokens
    LAST = "lasttoken"  # the last token's
