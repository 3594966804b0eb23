"""How much a JSON body holds, told from its punctuation, before anything is made of it.

8 MiB of `[],` take the decoder a second, in which nobody else is answered, and 200 MB; counting
takes about 20 ms. It knows JSON's quotes and brackets, not what a request means.
"""

from dataclasses import dataclass

import numpy as np

QUOTE, COMMA, BRACKET = b'",['


@dataclass(frozen=True, slots=True)
class Marks:
    """What stands outside the texts of a body; of malformed JSON, something near it."""

    text_count: int
    comma_count: int
    array_count: int


def count_marks(body: bytes) -> Marks:
    """The punctuation of *body*. Linear, and the same for any content."""
    if b"\\" in body:
        body = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    characters = np.frombuffer(body, np.uint8)
    quotes = characters == QUOTE
    is_outside = np.bitwise_xor.accumulate(quotes.view(np.uint8)) == 0
    return Marks(
        text_count=int(np.count_nonzero(quotes)) // 2,
        comma_count=int(np.count_nonzero((characters == COMMA) & is_outside)),
        array_count=int(np.count_nonzero((characters == BRACKET) & is_outside)),
    )
