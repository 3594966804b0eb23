"""Scoring: how well a document answers a query, from their vectors, in numpy on the host.

The three scores and their weighted mean are BGE-M3's (arXiv 2402.03216, section 3.2). A pair's
bits depend on its own rows alone: matrix products are made a pair at a time, since BLAS picks its
kernel by the number of rows.
"""

from collections.abc import Mapping

import numpy as np

from trivec.core.types import Float32Array, Output, Row, SparseVector

# The paper's weights of the three scores in multilingual retrieval (section 4.1).
WEIGHTS: Mapping[Output, float] = {Output.DENSE: 1.0, Output.SPARSE: 0.3, Output.MULTI: 1.0}
PRODUCTS_MAX = 4 * 1024 * 1024  # float32 at a time, 16 MiB: two texts of 8,192 tokens make 64 Mi
LENGTH_FLOOR = 1e-12


def cosine(query: Float32Array, document: Float32Array) -> float:
    """Cosine of two vectors `[dimensions]`; 0 where one of them is 0."""
    lengths = np.sqrt(np.dot(query, query)) * np.sqrt(np.dot(document, document))
    return float(np.dot(query, document) / max(lengths, LENGTH_FLOOR))


def lexical_score(query: SparseVector, document: SparseVector) -> float:
    """Σ of the products of the weights over the token ids that both have."""
    _, ours, theirs = np.intersect1d(
        query.token_ids, document.token_ids, assume_unique=True, return_indices=True
    )
    return float(np.dot(query.weights[ours], document.weights[theirs]))


def max_sim(query: Float32Array, document: Float32Array) -> float:
    """Late interaction: the mean over query tokens of the largest product with a document token.

    *query* `[query tokens, dimensions]`, *document* `[document tokens, dimensions]`. Products are
    made for so many query tokens at a time that `PRODUCTS_MAX` bounds them.
    """
    if not len(query) or not len(document):
        return 0.0
    step = max(1, PRODUCTS_MAX // len(document))
    best = [
        (query[i : i + step] @ document.T).max(axis=1)  # [query tokens of the step]
        for i in range(0, len(query), step)
    ]
    return float(np.concatenate(best).mean())


def fused_score(
    query: Mapping[Output, Row | None],
    document: Mapping[Output, Row | None],
    weights: Mapping[Output, float],
) -> float:
    """Weighted mean of the scores of those outputs that have a weight, and so a row in both."""
    total = 0.0
    for output, weight in weights.items():
        match query[output], document[output]:
            case SparseVector() as ours, SparseVector() as theirs:
                score = lexical_score(ours, theirs)
            case np.ndarray() as ours, np.ndarray() as theirs:
                score = max_sim(ours, theirs) if output is Output.MULTI else cosine(ours, theirs)
            case _:
                raise AssertionError(f"rows of different kinds in {output!r}")
        total += weight * score
    return total / sum(weights.values())
