"""How fast a device works through one model, learnt from the batches it ran. Pure values."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

# Device seconds after which what was learnt counts for 1/e.
WINDOW_S = 10.0

# Until the first batch is measured: an int8 BGE-M3 on two cores, and a tenth of that for the hang
# bound, so that a cold device is never taken for a hung one.
START_TOKENS_PER_S = 1_000.0
START_WORK_PER_S = 100.0

# Attention grows with the square of a length. Measured, a row of one 8,192-token text takes 7.5
# times as long a token as rows of up to 512; this says 9.
ATTENTION_TOKENS = 1_024


def work(lengths: Iterable[int]) -> float:
    """The cost of sequences of *lengths*, in tokens of a short text; an upper guess."""
    return sum(length * (1 + length / ATTENTION_TOKENS) for length in lengths)


@dataclass(frozen=True, slots=True)
class Pace:
    """Decayed sums over batches; their ratios are the pace."""

    slot_count: int
    tokens: float = START_TOKENS_PER_S * 1e-6  # the start counts for a microsecond
    work: float = START_WORK_PER_S * 1e-6
    seconds: float = 1e-6  # of one slot

    def after(self, *, tokens: int, work: float, duration_s: float, fill: float) -> "Pace":
        """The pace having seen one more batch.

        *fill* in (0, 1] is the batch's share of its budget: a lone short text is slow for its
        tokens, and a night of such must not make the first full batch look expensive.
        """
        kept = math.exp(-fill * duration_s / WINDOW_S)
        return replace(
            self,
            tokens=self.tokens * kept + fill * tokens,
            work=self.work * kept + fill * work,
            seconds=self.seconds * kept + fill * duration_s,
        )

    @property
    def tokens_per_s(self) -> float:
        """Of all slots together."""
        return self.slot_count * self.tokens / self.seconds

    def usual_s(self, tokens: int) -> float:
        """Seconds one slot takes for *tokens* in batches as they usually are."""
        return tokens * self.seconds / self.tokens

    def expected_s(self, work: float) -> float:
        """Seconds one slot needs at most, as far as can be told, for a batch of *work*."""
        return work * self.seconds / self.work
