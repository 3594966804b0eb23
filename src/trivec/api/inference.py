"""From the texts of a request to its vectors and scores: the same steps for every face.

A face reads its own fields with `read`, asks for vectors or scores here, and writes its own answer
with `respond`. Models without a head for scores rerank by their vectors.
"""

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from starlette.responses import Response

from trivec.api.context import RequestContext
from trivec.api.openai import LONG_TEXT, parse
from trivec.api.responses import FLOAT_TEXT_BYTES, IN_LINE_BYTES_MAX, ITEM_FRAME_BYTES
from trivec.api.schemas import Decoder
from trivec.core.errors import FieldInvalid, RequestError, TextTooLong
from trivec.core.ports import Embedder, Texts
from trivec.core.types import (
    Float32Array,
    LongText,
    Output,
    Row,
    Sequences,
    Truncated,
    Vectors,
)
from trivec.models.scoring import WEIGHTS, fused_score

T = TypeVar("T")

STRINGS_A_TEXT = 16  # at most: the fields of a document, or the parts that Cohere cuts an input into
WINDOW_BYTES = 128 * 1024 * 1024  # token vectors that are held at a time to score pairs with


@dataclass(frozen=True, slots=True)
class PairScores:
    """Scores of (query, document) pairs, in their order."""

    scores: NDArray[np.floating]  # [pairs, labels]
    is_logit: bool  # a reranker's; else a similarity of vectors, which is the same raw or not
    token_count: int
    truncated: Mapping[int, Truncated]  # by document

    def activated(self, *, raw: bool) -> NDArray[np.floating]:
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


async def read(decoder: Decoder[T], context: RequestContext, body: bytes | None = None) -> T:
    """The request in *body*, which is read unless it is given. Raises what reading it does."""
    body = await context.read_body() if body is None else body
    context.app.check_admission()
    return await parse(decoder, body, context, strings_a_text=STRINGS_A_TEXT)


def choose_embedder(
    context: RequestContext, name: str | None, outputs: Output, *, ranks: bool = False
) -> Embedder:
    """The model called *name*; without one, the first that the key may use and that has any of
    *outputs*, or else the first, and no classifier where it *ranks* if there is another. Raises
    `ModelUnknown`, `ModelDenied`.
    """
    if name is None:
        cards = context.app.cards_for(context.known_caller)
        cards = [card for card in cards if not ranks or card.labels <= 1] or cards
        suited = [card.id for card in cards if card.outputs & outputs]
        name = [*suited, *(card.id for card in cards), *context.app.embedders][0]
    return context.find_embedder(name)


def choose_long_text(context: RequestContext, truncate: bool | str | None) -> LongText:
    """What to do with a text that is too long: as the request says, or its key, or the server."""
    default = context.known_caller.truncate or context.app.limits.truncate
    return LONG_TEXT[default if truncate is None else truncate]


def check_texts(texts: Sequence[object], field: str, count_max: int) -> None:
    """Raise `FieldInvalid` where there are none, too many, or empty ones."""
    if not 0 < len(texts) <= count_max:
        raise FieldInvalid(
            f"Invalid '{field}': an array with length {len(texts)}. Send 1 to {count_max} at a time.",
            param=field,
        )
    for i, text in enumerate(texts):
        check_text(text, f"{field}[{i}]")


def check_text(text: object, field: str) -> None:
    """Raise `FieldInvalid` where it is empty."""
    if not text:
        raise FieldInvalid(
            f"Invalid '{field}': it is empty. Send at least one character.", param=field
        )


@contextmanager
def blamed_on(fields: Mapping[str, str]) -> Iterator[None]:
    """Let a refusal name the field that this face has: *fields*, by what OpenAI calls them."""
    try:
        yield
    except RequestError as error:
        ours, bracket, index = (error.param or "").partition("[")
        if theirs := fields.get(ours):
            message = str(error).replace(f"({ours}", f"({theirs}").replace(f"'{ours}", f"'{theirs}")
            error.args, error.param = (message,), theirs + bracket + index
        raise


async def score_pairs(
    context: RequestContext,
    embedder: Embedder,
    queries: Texts,
    documents: Texts,
    *,
    long_text: LongText,
    document_tokens_max: int | None = None,
    weights: Mapping[Output, float] | None = None,
    prompts: tuple[str, str] = ("", ""),
    response_bytes: int = 0,
    fields: tuple[str, str] = ("query", "documents"),
) -> PairScores:
    """Scores of *documents*, each for the one of *queries*, or for its own where there are many.

    By the model's head for scores, or else by its vectors, whose scores are weighted by *weights*
    and whose texts follow *prompts*. Only documents are cut, to *document_tokens_max* at most.
    *response_bytes*: what the answer takes beside its numbers. *fields*: what the face
    calls a query and the documents.
    """
    assert len(queries) in (1, len(documents))
    card, clock = embedder.card, context.app.clock
    by_head = Output.SCORE in card.outputs
    if by_head and weights is not None:
        raise FieldInvalid(
            "This model scores pairs of texts itself; 'weights' are for models that compare vectors.",
            param="weights",
        )
    await _begin(context, len(documents))
    started_s = clock.now_s()
    with blamed_on({"input": fields[1], "query": fields[0]}):
        if by_head:
            asked = list(queries) * (len(documents) if len(queries) == 1 else 1)
            sequences = await embedder.tokenize_pairs(
                list(zip(asked, documents, strict=True)),
                long_text=long_text,
                document_tokens_max=document_tokens_max,
            )
            truncated = sequences.truncated
        else:
            kept = await embedder.tokenize(queries, long_text=LongText.KEEP, prompt=prompts[0])
            longest = int(kept.lengths().max())
            if longest > card.token_count_max or kept.truncated:
                raise TextTooLong(
                    token_count=longest, token_count_max=card.token_count_max, index=None
                )
            answers = await embedder.tokenize(
                documents,
                long_text=long_text,
                prompt=prompts[1],
                token_count_max=document_tokens_max,
            )
            sequences, truncated = interleave(kept, answers), answers.truncated
    context.tokenize_s = clock.now_s() - started_s
    response_bytes += len(documents) * ITEM_FRAME_BYTES
    if by_head:
        scores = await _score_by_head(context, embedder, sequences, response_bytes)
    else:
        if weights is None:
            weights = {output: WEIGHTS[output] for output in WEIGHTS if output in card.outputs}
        scores = await _score_by_vectors(
            context, embedder, sequences, len(queries), weights, response_bytes
        )
    context.token_count = sequences.token_count
    return PairScores(scores, by_head, sequences.token_count, truncated)


async def score_texts(
    context: RequestContext, embedder: Embedder, texts: Texts, *, long_text: LongText, field: str
) -> PairScores:
    """Scores of *texts* alone, which came in *field*, by a classifier."""
    await _begin(context, len(texts))
    with blamed_on({"input": field}):
        sequences = await embedder.tokenize(texts, long_text=long_text)
    scores = await _score_by_head(context, embedder, sequences, len(texts) * ITEM_FRAME_BYTES)
    context.token_count = sequences.token_count
    return PairScores(scores, True, sequences.token_count, sequences.truncated)


async def _begin(context: RequestContext, count: int) -> None:
    context.input_count = count
    context.timeout.watch_client()
    await context.reservation.acquire(tokens_follow=True)


async def _score_by_head(
    context: RequestContext, embedder: Embedder, sequences: Sequences, response_bytes: int
) -> Float32Array:
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
    outputs, dimensions = Output(0), embedder.card.dimensions
    for output in weights:
        outputs |= output
    tokens_max = sequences.token_count
    vector_bytes = 4 * len(sequences) * dimensions + 8 * sequences.token_count
    if Output.MULTI in outputs:
        tokens_max = min(tokens_max, WINDOW_BYTES // (4 * dimensions))
        vector_bytes += 4 * tokens_max * dimensions
    await context.admit(
        sequences.token_count, response_bytes=response_bytes, vector_bytes=vector_bytes
    )
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
        vectors = await _compute(context, embedder, window, outputs)
        await asyncio.to_thread(add_scores, vectors, first)
        del vectors  # before the next are computed
    return np.array(scores)[:, np.newaxis]


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


async def _compute(
    context: RequestContext, embedder: Embedder, sequences: Sequences, outputs: Output
) -> Vectors:
    deadline_s = context.deadline_s - context.app.clock.now_s()
    reply = await embedder.embed(sequences, outputs, deadline_s=deadline_s)
    context.queue_s += reply.queue_s
    context.compute_s += reply.compute_s
    return reply.vectors


async def respond(
    context: RequestContext, write: Callable[[], bytes | memoryview], *, number_count: int
) -> Response:
    """The answer that *write* makes, in a thread where it holds many numbers."""
    started_s = context.app.clock.now_s()
    in_line = number_count * FLOAT_TEXT_BYTES <= IN_LINE_BYTES_MAX["float"]
    body = write() if in_line else await asyncio.to_thread(write)
    context.encode_s = context.app.clock.now_s() - started_s
    context.memory.shrink(len(body))
    return Response(body, media_type="application/json")
