"""About how many tokens a text will make, for refusing it in a full line before it is tokenised.

Learnt from what was tokenised of late. It is no count: nobody is billed, bounded or admitted by it.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from trivec.api.questions import TOKENS_MIN, Inputs
from trivec.core.types import ModelCard

WINDOW_BYTES = 1_000_000  # of text, after which what was learnt counts for half
LEEWAY = 0.9  # a guess is this much of the likely count, so that it seldom refuses what would fit


class Guess:
    """Tokens a byte of UTF-8, of one model; a byte says more across scripts than a character."""

    def __init__(self) -> None:
        self._tokens = 0.0
        self._bytes = 0.0
        self._under_way: list[int] = []  # tokens of each request between its guess and the line

    def learn(self, inputs: Inputs, token_count: int) -> None:
        """*inputs* were texts or ids that made *token_count* tokens."""
        if inputs.texts is None:
            return
        byte_count = sum(map(_bytes_of, inputs.texts))
        kept = WINDOW_BYTES / (WINDOW_BYTES + byte_count)
        self._tokens = self._tokens * kept + token_count
        self._bytes = self._bytes * kept + byte_count

    @contextmanager
    def under_way(self, token_count: int) -> Iterator[None]:
        """A request of about *token_count* is on its way into the line while this is open."""
        self._under_way.append(token_count)
        try:
            yield
        finally:
            self._under_way.remove(token_count)

    def tokens_ahead(self, token_count: int) -> int:
        """What fair turns will serve of those under way before a request of *token_count*."""
        return sum(min(one, token_count) for one in self._under_way)

    def tokens_of(self, inputs: Inputs, card: ModelCard) -> int:
        """Most likely no more than *inputs* will make; exact but for special tokens where ids."""
        most = card.token_count_max
        if inputs.texts is None:
            return sum(min(len(ids), most) for ids in inputs.token_lists or ())
        rate = LEEWAY * self._tokens / self._bytes if self._bytes else 0.0
        likely = [int(rate * _bytes_of(text)) for text in inputs.texts]
        return sum(min(max(TOKENS_MIN, count), most) for count in likely)


def _bytes_of(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))
