"""What is embedded when speed is measured, the same on every run, and the arithmetic it costs.

A word of these is about one token and a third in the served vocabularies.
"""

from dataclasses import dataclass
from math import prod

import numpy as np

from trivec.core.types import Sequences
from trivec.models.ops import AttentionSpec, ModelConfig
from trivec.models.registry import plan_of

SEED = 2024

_VOCABULARY = """
the a of and to in for on with as by at from that this which was were are is been has had people city
water river mountain train music child teacher school market price company report science model data
theory energy light machine engine paper story history language country government winter summer garden
window kitchen bread coffee doctor hospital patient law court quickly slowly never always often almost
together under over between without during after before small large old new red green early late public
private open quiet bright cold warm runs holds finds makes takes gives sees says keeps moves opens closes
begins ends writes reads photosynthesis infrastructure constitutional misunderstanding archaeological
"""
_WORDS = _VOCABULARY.split()


def sentences(count: int, *, words_median: float = 10.0, words_max: int = 180) -> list[str]:
    """Distinct sentences whose lengths are log-normal about *words_median*, as questions are."""
    draw = np.random.default_rng(SEED)
    lengths = np.clip(draw.lognormal(np.log(words_median), 0.45, count), 3, words_max)  # [texts]
    return [
        f"{' '.join(draw.choice(_WORDS, int(length)))} {number}."
        for number, length in enumerate(lengths)
    ]


@dataclass(frozen=True, slots=True)
class Workload:
    """Sequence lengths in tokens, special tokens included, and a name that says which."""

    name: str
    lengths: tuple[int, ...]

    @property
    def token_count(self) -> int:
        return sum(self.lengths)

    def pairs_seen(self, spec: AttentionSpec) -> int:
        """Pairs of tokens, each with itself among them, of which one attends to the other."""
        count = 0
        for length in self.lengths:
            reach = length - 1 if spec.window is None else min(spec.window, length - 1)
            before = reach * length - reach * (reach + 1) // 2  # all at one distance, then the next
            count += length + before * (1 if spec.causal else 2)
        return count

    def sequences(self, *, vocabulary_size: int) -> Sequences:
        """Random ids of these lengths; arithmetic takes as long on them as on sense."""
        draw = np.random.default_rng(SEED)
        ids = draw.integers(5, vocabulary_size - 5, self.token_count, np.int32)  # [tokens]
        starts = np.zeros(len(self.lengths) + 1, np.int32)
        np.cumsum(self.lengths, out=starts[1:])
        return Sequences(ids, starts)


def weight_shapes(config: ModelConfig, layers: int | None = None) -> list[list[tuple[int, ...]]]:
    """[out, in] of each linear layer, those that read the same input together; of so many *layers*."""
    plan = plan_of(config)
    return [
        [plan.shapes[f"{name}.weight"] for name in group.names]
        for group in plan.linears
        if layers is None or group.layer < layers
    ]


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """Billions of operations of a workload: the weights' products, and attention's two."""

    weights_gop: float
    attention_gop: float

    @classmethod
    def of(cls, workload: Workload, config: ModelConfig) -> "Arithmetic":
        """A token costs 2 for each weight; a pair of tokens 4 for each number in a layer's heads."""
        weights = sum(prod(shape) for group in weight_shapes(config) for shape in group)
        specs = plan_of(config).attention
        attention = sum(4 * spec.size * workload.pairs_seen(spec) for spec in specs)
        return cls(2 * weights * workload.token_count / 1e9, attention / 1e9)

    @property
    def gop(self) -> float:
        return self.weights_gop + self.attention_gop

    def least_s(self, *, weights_gops: float, attention_gops: float) -> float:
        """What it costs at these rates and nothing else."""
        return self.weights_gop / weights_gops + self.attention_gop / attention_gops


def uniform(length: int, *, tokens: int) -> Workload:
    """As many sequences of *length* as *tokens* hold, at least one."""
    return Workload(str(length), (length,) * max(1, tokens // length))


def mixed(*, tokens: int, length_max: int) -> Workload:
    """Log-normal lengths from 4 to *length_max* (2,048 at most), about *tokens* in all."""
    draw, lengths = np.random.default_rng(SEED), list[int]()
    while sum(lengths) < tokens:
        lengths.append(int(np.clip(draw.lognormal(np.log(60), 1.2), 4, min(2048, length_max))))
    return Workload("mixed", tuple(lengths))
