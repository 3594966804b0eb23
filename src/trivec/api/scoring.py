"""Scores of pairs of texts: by a model's head for them, or else by comparing its vectors."""

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from trivec.api.context import RequestContext
from trivec.api.responses import FLOAT_TEXT_BYTES, ITEM_FRAME_BYTES
from trivec.api.rules import LONG_TEXT, blamed_on, check_text, check_texts, choose_prompt
from trivec.core.errors import FieldInvalid, TextTooLong
from trivec.core.ports import Embedder, Texts
from trivec.core.types import LongText, ModelCard, Output, Row, Sequences, Truncated, Vectors
from trivec.models.scoring import WEIGHTS, fused_score

DOCUMENTS_MAX = 1000
WINDOW_BYTES = 128 * 1024 * 1024  # token vectors that are held at a time to score pairs with


@dataclass(frozen=True, slots=True)
class PairScores:
    """Scores of (query, document) pairs, in their order."""

    scores: NDArray[np.floating]  # [pairs, labels]
    is_logit: bool  # a reranker's; else a similarity of vectors, which is the same raw or not
    token_count: int
    truncated: Mapping[int, Truncated]  # by document

    def activated(self, *, raw: bool | None) -> NDArray[np.floating]:
        """Probabilities `[pairs, labels]`: a sigmoid of one label, a softmax of several."""
        logits = self.scores.astype(np.float64)
        if raw or not self.is_logit:
            return logits
        if logits.shape[1] == 1:
            half = np.exp(-np.abs(logits))  # of the side that does not overflow
            probabilities: NDArray[np.float64] = np.where(logits < 0, half, 1.0) / (1.0 + half)
            return probabilities
        shares = np.exp(logits - logits.max(axis=1, keepdims=True))
        normalised: NDArray[np.float64] = shares / shares.sum(axis=1, keepdims=True)
        return normalised

    def ranked(self, count: int | None = None, *, raw: bool | None = False) -> dict[int, float]:
        """Scores of the *count* best documents, or of all, by place; ties in their order."""
        scores = self.activated(raw=raw)[:, 0]
        order = np.argsort(-scores, kind="stable")[: count or len(scores)]
        return dict(zip(order.tolist(), scores[order].tolist(), strict=True))


async def rank(
    context: RequestContext,
    embedder: Embedder,
    query: str,
    texts: Sequence[str],
    *,
    truncate: bool | str | None,
    document_tokens_max: int | None = None,
    weights: Mapping[Output, float] | None = None,
    returns_texts: bool | None = False,
    field: str = "documents",
) -> PairScores:
    """Scores of *texts*, which came in *field*, for one *query*. Raises `FieldInvalid` as well.

    A model that has prompts for queries and documents compares the vectors of texts behind them.
    """
    check_text(query, "query")
    check_texts(texts, field, DOCUMENTS_MAX)
    require_one_label(embedder.card)
    return await score_pairs(
        context,
        embedder,
        [query],
        texts,
        truncate=truncate,
        document_tokens_max=document_tokens_max,
        weights=weights,
        prompts=(
            choose_prompt(embedder.card, input_type="query"),
            choose_prompt(embedder.card, input_type="document"),
        ),
        response_bytes=2 * sum(map(len, texts)) if returns_texts else 0,
        fields=("query", field),
    )


def require_one_label(card: ModelCard) -> None:
    """Raise `FieldInvalid` for a classifier, whose scores are in no order."""
    if card.labels > 1:
        raise FieldInvalid(
            f"This model sorts texts into {card.labels} classes and cannot rank them; "
            "ask it with /predict.",
            param="model",
        )


async def score_pairs(
    context: RequestContext,
    embedder: Embedder,
    queries: Texts | None,
    documents: Texts,
    *,
    truncate: bool | str | None,
    document_tokens_max: int | None = None,
    weights: Mapping[Output, float] | None = None,
    prompts: tuple[str, str] = ("", ""),
    response_bytes: int = 0,
    fields: tuple[str, str] = ("query", "documents"),
) -> PairScores:
    """Scores of *documents*, each for the one of *queries*, or for its own where there are many.

    By the model's head for scores, a classifier's of documents alone, where *queries* is None; or
    else by its vectors, whose scores are weighted by *weights* and whose texts follow *prompts*.
    Only documents are cut, to *document_tokens_max* at most. *response_bytes*: what the answer
    takes beside its numbers. *fields*: what the face calls a query and the documents.
    """
    assert queries is None or len(queries) in (1, len(documents))
    card, now_s = embedder.card, context.app.clock.now_s
    by_head = Output.SCORE in card.outputs
    if by_head and weights is not None:
        raise FieldInvalid(
            "This model scores pairs of texts itself; 'weights' are for models that compare vectors.",
            param="weights",
        )
    context.input_count = len(documents)
    await context.reservation.acquire(tokens_follow=True)
    started_s = now_s()
    long_text = LONG_TEXT[context.truncate if truncate is None else truncate]
    names = {"input": fields[1], "query": fields[0], "prompt": None, "token_count_max": None}
    with blamed_on(names):
        if queries is None:
            sequences = read = await embedder.tokenizer.tokenize(documents, long_text=long_text)
        elif by_head:
            asked = list(queries) * (len(documents) if len(queries) == 1 else 1)
            sequences = read = await embedder.tokenizer.tokenize_pairs(
                list(zip(asked, documents, strict=True)),
                long_text=long_text,
                document_tokens_max=document_tokens_max,
            )
        else:
            kept = await embedder.tokenizer.tokenize(
                queries, long_text=LongText.KEEP, prompt=prompts[0]
            )
            longest = int(kept.lengths().max())
            limits = (one.kept_tokens for one in kept.truncated.values())
            count_max = min([card.token_count_max, *limits])
            if longest > count_max or kept.truncated:
                raise TextTooLong(token_count=longest, token_count_max=count_max, index=None)
            read = await embedder.tokenizer.tokenize(
                documents,
                long_text=long_text,
                prompt=prompts[1],
                token_count_max=document_tokens_max,
            )
            sequences = interleave(kept, read)
    context.tokenize_s = now_s() - started_s
    response_bytes += len(documents) * ITEM_FRAME_BYTES
    if by_head or queries is None:
        scores = await _score_by_head(context, embedder, sequences, response_bytes)
    else:
        if weights is None:
            weights = {output: WEIGHTS[output] for output in WEIGHTS if output in card.outputs}
        scores = await _score_by_vectors(
            context, embedder, sequences, len(queries), weights, response_bytes
        )
    return PairScores(scores, by_head, sequences.token_count, read.truncated)


async def _score_by_head(
    context: RequestContext, embedder: Embedder, sequences: Sequences, response_bytes: int
) -> NDArray[np.floating]:
    """Logits `[sequences, labels]`."""
    number_count = len(sequences) * embedder.card.labels
    response_bytes += number_count * FLOAT_TEXT_BYTES
    await context.admit(
        sequences.token_count, response_bytes=response_bytes, vector_bytes=4 * number_count
    )
    return (await _compute(context, embedder, sequences, Output.SCORE)).score


async def _score_by_vectors(
    context: RequestContext,
    embedder: Embedder,
    sequences: Sequences,
    query_count: int,
    weights: Mapping[Output, float],
    response_bytes: int,
) -> NDArray[np.floating]:
    """Scores `[documents, 1]` of *sequences*, in which each query comes before its documents.

    In one pass, but for token vectors: of those only `WINDOW_BYTES` are held at a time.
    """
    outputs, dimensions = Output(sum(weights)), embedder.card.dimensions
    tokens_max = sequences.token_count
    vector_bytes = 4 * len(sequences) * dimensions + 8 * sequences.token_count
    if Output.MULTI in outputs:
        tokens_max = min(tokens_max, WINDOW_BYTES // (4 * dimensions))
        vector_bytes += 4 * tokens_max * dimensions
    await context.admit(
        sequences.token_count, response_bytes=response_bytes, vector_bytes=vector_bytes
    )
    if not context.background:
        # Of the whole, since the windows after the first are let in whatever waits by then.
        embedder.check_admission(sequences.token_count)
    scores: list[float] = []
    query: dict[Output, Row | None] = {}

    def add_scores(vectors: Vectors, first: int) -> None:
        """Of the sequences from *first* on, whose rows are in *vectors*."""
        for i in range(len(vectors)):
            row = {output: vectors[output][i] for output in weights}
            if first + i == 0 or (query_count > 1 and (first + i) % 2 == 0):
                query.update(row)
            else:
                scores.append(fused_score(query, row, weights))

    for first, end in windows(sequences, tokens_max):
        begin, stop = sequences.cu_seqlens[[first, end]]
        window = Sequences(
            sequences.token_ids[begin:stop],
            sequences.cu_seqlens[first : end + 1] - begin,
            skip=None if sequences.skip is None else sequences.skip[first:end],
        )
        vectors = await _compute(context, embedder, window, outputs, continues=first > 0)
        await asyncio.to_thread(add_scores, vectors, first)
        del vectors  # before the next are computed
    return np.array(scores)[:, np.newaxis]


async def _compute(
    context: RequestContext,
    embedder: Embedder,
    sequences: Sequences,
    outputs: Output,
    *,
    continues: bool = False,
) -> Vectors:
    reply = await embedder.embed(
        sequences,
        outputs,
        timeout_s=context.deadline_s - context.app.clock.now_s(),
        continues=continues,
        background=context.background,
    )
    context.token_count += sequences.token_count
    context.queue_s += reply.queue_s
    context.compute_s += reply.compute_s
    return reply.vectors


def interleave(queries: Sequences, documents: Sequences) -> Sequences:
    """Each query before its document; a lone one before them all."""
    order = [0, *range(1, 1 + len(documents))]
    if len(queries) > 1:
        order = np.arange(2 * len(queries)).reshape(2, -1).T.ravel().tolist()
    parts = [
        ids
        for sequences in (queries, documents)
        for ids in np.split(sequences.token_ids, sequences.cu_seqlens[1:-1])
    ]
    packed = Sequences.pack([parts[i] for i in order])
    if queries.skip is None and documents.skip is None:
        return packed
    skips = [
        np.zeros(len(sequences), np.int32) if sequences.skip is None else sequences.skip
        for sequences in (queries, documents)
    ]
    return replace(packed, skip=np.concatenate(skips)[order])


def windows(sequences: Sequences, tokens_max: int) -> Iterator[tuple[int, int]]:
    """Neighbouring sequences of at most *tokens_max* tokens, or one alone: first and end."""
    first, tokens = 0, 0
    for i, length in enumerate(sequences.lengths().tolist()):
        if i > first and tokens + length > tokens_max:
            yield first, i
            first, tokens = i, 0
        tokens += length
    yield first, len(sequences)
