"""What is embedded when speed is measured: sentences and lengths, the same on every run.

A word of these is about one token and a third in the served vocabularies.
"""

from dataclasses import dataclass

import numpy as np

from trivec.core.types import Int32Array, Sequences

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

    def squares(self) -> int:
        """Sum of squared lengths: what attention's arithmetic grows with."""
        return sum(length * length for length in self.lengths)

    def sequences(self, *, vocabulary_size: int) -> Sequences:
        """Random ids of these lengths; arithmetic takes as long on them as on sense."""
        draw = np.random.default_rng(SEED)
        ids: Int32Array = draw.integers(
            5, vocabulary_size - 5, self.token_count, dtype=np.int32
        )  # [tokens]
        starts = np.zeros(len(self.lengths) + 1, np.int32)
        np.cumsum(self.lengths, out=starts[1:])
        return Sequences(ids, starts)


def uniform(length: int, *, tokens: int) -> Workload:
    """As many sequences of *length* as *tokens* hold, at least one."""
    return Workload(str(length), (length,) * max(1, tokens // length))


def mixed(*, tokens: int, length_max: int) -> Workload:
    """Log-normal lengths from 4 to *length_max* (2,048 at most), about *tokens* in all."""
    draw, lengths = np.random.default_rng(SEED), list[int]()
    while sum(lengths) < tokens:
        lengths.append(int(np.clip(draw.lognormal(np.log(60), 1.2), 4, min(2048, length_max))))
    return Workload("mixed", tuple(lengths))
