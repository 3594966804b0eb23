"""How a peer's process talks: a JSON line in, a JSON line out, one at a time.

It runs inside a peer's own environment, so it knows numpy and nothing of ours. Between two questions
the process waits on its input and costs nothing: that is what makes interleaved repeats fair.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np

CHECKED = 8  # vectors sent back for a look at whether everybody computes the same thing
BATCH = 32  # texts at once, the default of sentence-transformers

Embed: TypeAlias = Callable[[Sequence[str]], Any]  # texts to float32 [texts, dimensions]


def answer(embed: Embed) -> None:
    """Say that *embed* is loaded, then time it on each list of texts that comes in, until the end.

    Question: `{"texts": [...]}`. Answer: `{"seconds": s, "vectors": [[...], ...]}`.
    """
    talk = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is talk, not an answer
    print(json.dumps({"loaded": True}), file=talk, flush=True)
    for line in sys.stdin:
        texts = json.loads(line)["texts"]
        started_s = time.perf_counter()
        vectors = embed(texts)
        seconds = time.perf_counter() - started_s
        few = np.asarray(vectors[:CHECKED], np.float32).tolist()
        print(json.dumps({"seconds": seconds, "vectors": few}), file=talk, flush=True)


def in_batches(embed: Embed, *, texts_max: int = BATCH) -> Embed:
    """*embed* over batches of neighbours in length, longest first, as every fast peer does it."""

    def whole(texts: Sequence[str]) -> Any:
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        parts = [
            np.asarray(embed([texts[i] for i in order[at : at + texts_max]]), np.float32)
            for at in range(0, len(order), texts_max)
        ]
        vectors = np.empty((len(texts), parts[0].shape[1]), np.float32)
        vectors[order] = np.concatenate(parts)
        return vectors

    return whole


def pooled(hidden: Any, mask: Any, pooling: str) -> Any:
    """Unit vectors of *hidden* `[texts, length, hidden]` by `cls` or `mean` over *mask* `[texts, length]`."""
    if pooling == "cls":
        rows = hidden[:, 0]
    else:
        weight = mask[..., None].astype(np.float32)
        rows = (hidden * weight).sum(1) / weight.sum(1)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)
