"""The canary: one text, embedded again and again, whose vector must never change.

It works through the public seam as any client does, and knows nothing of what is behind it.
"""

from collections.abc import Iterable

import numpy as np

from trivec.core.errors import BusyError, EngineFault
from trivec.core.ports import Embedder
from trivec.core.types import Float32Array, LongText, Output

TEXT = "The canary sings the same three notes every half minute: 一、二、三 · один, два, три."
COSINE_MIN = 0.9999


class Canary:
    """The first vector of every model, and whether the latest one still agrees with it."""

    def __init__(self, embedders: Iterable[Embedder]) -> None:
        by_id = {embedder.card.id: embedder for embedder in embedders}  # aliases counted once
        self._embedders = tuple(by_id.values())
        self._first: dict[str, Float32Array] = {}
        self._troubles: dict[str, str] = {}

    @property
    def troubles(self) -> tuple[str, ...]:
        """What the last check found wrong, a sentence a model."""
        return tuple(self._troubles.values())

    async def learn(self) -> None:
        """Embed the text with every model and remember the vectors; this warms them up, too."""
        for embedder in self._embedders:
            self._first[embedder.card.id] = await _embed(embedder)

    async def check(self) -> None:
        """Embed the text again and compare. A full line proves nothing, so it changes nothing."""
        for embedder in self._embedders:
            model = embedder.card.id
            try:
                now = await _embed(embedder)
            except BusyError:
                continue
            except EngineFault as fault:
                self._troubles[model] = f"the canary of {model} failed: {fault}"
                continue
            similarity = cosine(now, self._first[model])
            if similarity >= COSINE_MIN:
                self._troubles.pop(model, None)
            else:
                self._troubles[model] = (
                    f"the canary of {model} changed: cosine {similarity:.6f} to its first vector, "
                    f"at least {COSINE_MIN} expected"
                )


async def _embed(embedder: Embedder) -> Float32Array:
    sequences = await embedder.tokenize([TEXT], long_text=LongText.CUT_END)
    reply = await embedder.embed(sequences, Output.DENSE)
    vector: Float32Array = reply.vectors.dense[0]  # [dimensions]
    return vector


def cosine(a: Float32Array, b: Float32Array) -> float:
    """The cosine of two vectors `[dimensions]`; NaN where one is not finite or is zero."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return float(np.dot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b)))
