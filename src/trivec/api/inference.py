"""From the texts of a request to its vectors and scores: the same steps for every face.

A face reads its own fields with `read`, asks for vectors or scores here, and writes its own answer
with `respond`. Models without a head for scores rerank by their vectors.
"""

import asyncio
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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
from trivec.core.types import LongText, Output, Row, Sequences, Truncated, Vectors
from trivec.models.scoring import WEIGHTS, fused_score

T = TypeVar("T")

WINDOW_BYTES = 128 * 1024 * 1024  # token vectors that are held at a time to score pairs with
_INPUT = re.compile(r"input\[(\d+)\]")


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


async def read(decoder: Decoder[T], context: RequestContext) -> T:
    """The request in the body. Raises what `RequestContext.read_body` and the decoder do."""
    body = await context.read_body()
    context.app.check_admission()
    return await parse(decoder, body, context)


def choose_embedder(context: RequestContext, name: str | None, outputs: Output) -> Embedder:
    """The model called *name*; without one, the first that the key may use and that has any of
    *outputs*, or else the first. Raises `ModelUnknown`, `ModelDenied`.
    """
    if name is None:
        cards = context.app.cards_for(context.known_caller)
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
def blamed_on(field: Callable[[int], str]) -> Iterator[None]:
    """Let a refusal of `input[i]` name the field that this face has for it."""
    try:
        yield
    except RequestError as error:
        if (found := _INPUT.fullmatch(error.param or "")) is None:
            raise
        name = field(int(found[1]))
        error.args = (str(error).replace(found[0], name),)
        error.param = name
        raise


async def score_pairs(
    context: RequestContext,
    embedder: Embedder,
    queries: Texts,
    documents: Texts,
    *,
    long_text: LongText,
    weights: Mapping[Output, float] | None = None,
    response_bytes: int = 0,
    fields: tuple[str, str] = ("query", "documents"),
) -> PairScores:
    """Scores of *documents*, each for the one of *queries*, or for its own where there are many.

    By the model's head for scores, or else by its vectors, whose scores are weighted by *weights*.
    Only documents are cut. *response_bytes*: what the answer takes beside its numbers. *fields*:
    what the face calls a query and the documents.
    """
    assert len(queries) in (1, len(documents))
    context.input_count = len(documents)
    context.timeout.watch_client()
    await context.reservation.acquire(tokens_follow=True)
    response_bytes += len(documents) * ITEM_FRAME_BYTES
    by_head = Output.SCORE in embedder.card.outputs
    if by_head and weights is not None:
        raise FieldInvalid(
            "This model scores pairs of texts itself; 'weights' are for models that compare vectors.",
            param="weights",
        )
    try:
        with blamed_on(lambda i: f"{fields[1]}[{i}]"):
            if by_head:
                return await _by_head(
                    context, embedder, queries, documents, long_text, response_bytes
                )
            return await _by_vectors(
                context, embedder, queries, documents, long_text, response_bytes, weights
            )
    except RequestError as error:
        if error.param == "query":
            error.args, error.param = (str(error).replace("(query)", f"({fields[0]})"),), fields[0]
        raise


async def _by_head(
    context: RequestContext,
    embedder: Embedder,
    queries: Texts,
    documents: Texts,
    long_text: LongText,
    response_bytes: int,
) -> PairScores:
    started_s = context.app.clock.now_s()
    asked = list(queries) * (len(documents) if len(queries) == 1 else 1)
    pairs = list(zip(asked, documents, strict=True))
    sequences = await embedder.tokenize_pairs(pairs, long_text=long_text)
    context.tokenize_s = context.app.clock.now_s() - started_s
    vector_bytes = 4 * len(pairs) * embedder.card.labels
    await context.admit(
        sequences.token_count, response_bytes=response_bytes, vector_bytes=vector_bytes
    )
    vectors = await _compute(context, embedder, sequences, Output.SCORE)
    context.token_count = sequences.token_count
    return PairScores(vectors.score, True, sequences.token_count, sequences.truncated)


async def _by_vectors(
    context: RequestContext,
    embedder: Embedder,
    queries: Texts,
    documents: Texts,
    long_text: LongText,
    response_bytes: int,
    weights: Mapping[Output, float] | None,
) -> PairScores:
    card, started_s = embedder.card, context.app.clock.now_s()
    if weights is None:
        weights = {output: weight for output, weight in WEIGHTS.items() if output in card.outputs}
    kept = await embedder.tokenize(queries, long_text=LongText.KEEP)
    if (longest := int(kept.lengths().max())) > card.token_count_max or kept.truncated:
        raise TextTooLong(token_count=longest, token_count_max=card.token_count_max, index=None)
    asked = _split(kept)
    answers = await embedder.tokenize(documents, long_text=long_text)
    # A query comes before its documents, and its rows are kept until the next.
    pairs = zip(asked, _split(answers), strict=False)
    rest = _split(answers)[1:] if len(asked) == 1 else []
    sequences = Sequences.pack([ids for pair in pairs for ids in pair] + rest)
    context.tokenize_s = context.app.clock.now_s() - started_s

    outputs = Output(0)
    for output in weights:
        outputs |= output
    tokens_max = sequences.token_count
    if Output.MULTI in outputs:
        tokens_max = min(tokens_max, WINDOW_BYTES // (4 * card.dimensions))
    vector_bytes = 4 * len(sequences) * card.dimensions + 8 * sequences.token_count
    vector_bytes += 4 * tokens_max * card.dimensions if Output.MULTI in outputs else 0
    await context.admit(
        sequences.token_count, response_bytes=response_bytes, vector_bytes=vector_bytes
    )
    scores: list[float] = []
    query: dict[Output, Row | None] = {}

    def add_scores(vectors: Vectors, first: int) -> None:
        """Of the sequences from *first* on, whose rows are in *vectors*."""
        for i in range(len(vectors)):
            row = {output: vectors[output][i] for output in weights}
            place = first + i
            if place == 0 or (len(asked) > 1 and place % 2 == 0):
                query.update(row)
            else:
                scores.append(fused_score(query, row, weights))

    for first, end in windows(sequences, tokens_max):
        begin, stop = sequences.cu_seqlens[[first, end]]
        starts = sequences.cu_seqlens[first : end + 1] - begin
        window = Sequences(sequences.token_ids[begin:stop], starts)
        vectors = await _compute(context, embedder, window, outputs)
        await asyncio.to_thread(add_scores, vectors, first)
        del vectors  # before the next are computed
    context.token_count = sequences.token_count
    found = np.array(scores, np.float64)[:, np.newaxis]  # [pairs, 1]
    return PairScores(found, False, sequences.token_count, answers.truncated)


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


def _split(sequences: Sequences) -> list[NDArray[np.int32]]:
    return np.split(sequences.token_ids, sequences.cu_seqlens[1:-1])


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
