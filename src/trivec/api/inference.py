"""From the inputs of a request to its vectors: the same steps for every face.

A face reads its own fields with `read`, asks for vectors with `embed`, or for scores as in
`scoring.py`, and writes its own answer with `respond`.
"""

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar, cast

import numpy as np
from starlette.datastructures import QueryParams
from starlette.responses import Response

from trivec.api.context import RequestContext
from trivec.api.responses import IN_LINE_BYTES_MAX, estimate_bytes
from trivec.api.rules import (
    LONG_TEXT,
    blamed_on,
    check_inputs,
    choose_outputs,
    choose_prompt,
    own_token_ids,
    refuse_too_many_items,
)
from trivec.api.schemas import (
    Chunk,
    Decoder,
    EmbeddingsRequest,
    Encoding,
    TokenizeRequest,
    decoder_of,
)
from trivec.core.errors import FieldInvalid, Overloaded
from trivec.core.ports import Embedder, Texts, TokenLists
from trivec.core.types import LongText, Output, Sequences, Vectors
from trivec.tokenizer.encodings import decode

T = TypeVar("T")

PARSE_IN_LINE_BYTES_MAX = 256 * 1024  # larger bodies are parsed in a thread
LARGE_TOKENIZE_BYTES = 64 * 1024  # of a body; smaller ones need not wait for others
LARGE_TOKENIZE_MAX = 5  # at a time: one runs, the others wait
TEXT_TOKEN_BYTES = 320  # a token with its text and place, as objects
# Of other faces: the fields of a document, or the parts that Cohere cuts an input into.
STRINGS_A_TEXT = 16


@dataclass(frozen=True, slots=True)
class EmbeddedInputs:
    """The inputs of a request and their vectors."""

    sequences: Sequences
    vectors: Vectors
    outputs: Output  # that were asked for
    response_bytes: int  # of the response in the form that was asked for, near enough


async def read(
    kind: type[T], context: RequestContext, body: bytes | None = None, *, joins_queue: bool = True
) -> T:
    """The request in *body*, which is read unless it is given. From here on its client is watched.

    Raises what reading the body does, `MalformedBody`, `FieldInvalid`, `RequestTooLarge`; and, of
    one that *joins_queue*, `Overloaded`.
    """
    body = await context.read_body() if body is None else body
    if not context.background:
        context.timeout.watch_client()
        if joins_queue:  # looked at after reading: a connection with an unread body is lost
            context.app.check_admission()
    decoder: Decoder[T] = decoder_of(kind)  # type: ignore[arg-type] # every class has a hash
    if len(body) <= PARSE_IN_LINE_BYTES_MAX:
        return decoder.decode(body)
    strings = 1 if issubclass(kind, TokenizeRequest) else STRINGS_A_TEXT
    await asyncio.to_thread(refuse_too_many_items, body, context.app.limits, strings)
    return await asyncio.to_thread(decoder.decode, body)


def read_query(kind: type[T], context: RequestContext) -> T:
    """The request in the query. Raises `FieldInvalid`."""
    decoder: Decoder[T] = decoder_of(kind)  # type: ignore[arg-type] # every class has a hash
    return decoder.convert(dict(QueryParams(context.query_string)))


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


async def embed(asked: EmbeddingsRequest, context: RequestContext) -> EmbeddedInputs:
    """The vectors of what was *asked*, by whichever face, within all limits, and billed.

    Whatever can be refused is refused before the model is touched.
    """
    clock = context.app.clock
    context.user = asked.user
    context.input_count = rows = check_inputs(asked.input, context.app.limits)
    embedder = context.find_embedder(asked.model)
    card = embedder.card
    outputs = choose_outputs(asked, card)
    least_bytes = sum(estimate_bytes(asked, outputs, card, rows=rows, tokens=rows))
    context.memory.add(least_bytes, is_response=True)  # before the work of tokenising
    await context.reservation.acquire(tokens_follow=True)

    long_text = LONG_TEXT[context.truncate if asked.cut is None else asked.cut]
    count_max = asked.truncate_prompt_tokens
    if count_max is not None:
        count_max = card.token_count_max if count_max == -1 else count_max
        if not 1 <= count_max <= card.token_count_max:
            raise FieldInvalid(
                f"Invalid value for 'truncate_prompt_tokens' = {count_max}. It is -1, or 1 to "
                f"{card.token_count_max}, which is all that this model reads.",
                param="truncate_prompt_tokens",
            )
        long_text = LongText.CUT_END if long_text is LongText.REFUSE else long_text
    sequences = await tokenize_input(
        asked, embedder, context, long_text=long_text, token_count_max=count_max
    )
    token_count = sequences.token_count
    if sequences.chunks is not None:
        rows = sum(len(bounds) - 1 for bounds in sequences.chunks)
    response_bytes, vector_bytes = estimate_bytes(
        asked, outputs, card, rows=rows, tokens=token_count
    )
    await context.admit(
        token_count,
        response_bytes=response_bytes,
        vector_bytes=vector_bytes,
        reserved_bytes=least_bytes,
    )

    wanted = outputs if sequences.chunks is None else Output.CHUNKS
    reply = await embedder.embed(
        sequences,
        wanted,
        timeout_s=context.deadline_s - clock.now_s(),
        background=context.background,
    )
    context.token_count = token_count
    context.queue_s, context.compute_s = reply.queue_s, reply.compute_s
    vectors = reply.vectors
    if sequences.chunks is not None:  # each as a text of its own would be
        vectors = Vectors.of(np.concatenate([rows for rows in vectors.chunks if rows is not None]))
    if card.layer_norm_before_cut and asked.size not in (None, card.dimensions):
        # What a LayerNorm divides by, the later division by the slice's own length undoes.
        centred = vectors.dense - vectors.dense.mean(axis=1, keepdims=True)
        vectors = Vectors({**vectors.rows, Output.DENSE: centred})
    return EmbeddedInputs(sequences, vectors, outputs, response_bytes)


async def tokenize_input(
    asked: TokenizeRequest,
    embedder: Embedder,
    context: RequestContext,
    *,
    long_text: LongText,
    token_count_max: int | None = None,
) -> Sequences:
    """The sequences of the texts or token ids in *asked*. Raises what `TextTokenizer.tokenize` does."""
    given = asked.input
    encoding = asked.token_encoding or context.app.limits.token_encoding
    started_s = context.app.clock.now_s()
    inputs: Texts | TokenLists
    if isinstance(given, str):
        inputs = [given]
    elif isinstance(given[0], str):
        inputs = cast("list[str]", given)
    else:
        is_flat = isinstance(given[0], int)  # the ids of one text, without a list around them
        lists = cast("list[list[int]]", [given] if is_flat else given)
        if encoding in (None, "model"):
            inputs = own_token_ids(lists, embedder.card.vocabulary_size, is_flat=is_flat)
        else:
            inputs = await asyncio.to_thread(decode, lists, encoding)
            context.memory.add(sum(map(len, inputs)))
            context.token_encoding = encoding
    prompt = ""
    if asked.prompt_field or embedder.card.default_prompt_name is not None:
        prompt = choose_prompt(
            embedder.card,
            prompt=asked.prompt,
            prompt_name=asked.prompt_name,
            input_type=asked.input_type,
            task=asked.task,
            are_texts=isinstance(inputs[0], str),
        )
    if isinstance(asked, EmbeddingsRequest) and asked.is_chunked:
        texts = cast("list[str]", inputs)
        sequences = await embedder.tokenizer.tokenize_chunks(
            texts, prompt=prompt, chunk_size=asked.chunk_size
        )
        if asked.chunk_size is not None:
            context.memory.add(sequences.token_count * TEXT_TOKEN_BYTES, is_response=True)
            context.chunks = await find_chunks(texts, sequences, embedder, prompt=prompt)
    else:
        names = {"prompt": asked.prompt_field, "token_count_max": "truncate_prompt_tokens"}
        with blamed_on(names) if prompt or token_count_max else nullcontext():
            sequences = await embedder.tokenizer.tokenize(
                inputs,
                long_text=long_text,
                trusted=encoding == "model",
                prompt=prompt,
                token_count_max=token_count_max,
            )
    context.tokenize_s = context.app.clock.now_s() - started_s
    return sequences


async def find_chunks(
    texts: Texts, sequences: Sequences, embedder: Embedder, *, prompt: str
) -> list[Chunk]:
    """Where each chunk of *sequences* lies in its text, which had *prompt* before it."""
    found = await embedder.tokenizer.find_tokens(
        [prompt + text for text in texts], special_tokens=True
    )
    assert sequences.chunks is not None
    return [
        Chunk(
            i,
            (int(start), int(end)),
            (max(0, tokens[start].start - len(prompt)), tokens[end - 1].end - len(prompt)),
        )
        for i, (tokens, bounds) in enumerate(zip(found, sequences.chunks, strict=True))
        for start, end in pairwise(bounds.tolist())
    ]


@asynccontextmanager
async def tokenizer_turn(context: RequestContext) -> AsyncIterator[None]:
    """Let a large request wait for its turn, for it takes the tokenizer's threads from embeddings."""
    app = context.app
    if context.request_bytes < LARGE_TOKENIZE_BYTES:
        yield
        return
    if app.large_tokenize_count >= LARGE_TOKENIZE_MAX:
        raise Overloaded(
            f"{LARGE_TOKENIZE_MAX - 1} large requests to tokenize are waiting, which is the most. "
            "Please try again shortly, with fewer inputs at a time.",
            retry_after_s=random.uniform(5, 10),  # noqa: S311 # not all at once again
        )
    app.large_tokenize_count += 1
    try:
        async with app.large_tokenize:
            yield
    finally:
        app.large_tokenize_count -= 1


async def respond(
    context: RequestContext,
    write: Callable[[], bytes | memoryview],
    *,
    byte_count: float,
    encoding: Encoding = "float",
) -> Response:
    """The JSON that *write* makes, in a thread where its *byte_count* is large for its *encoding*."""
    started_s = context.app.clock.now_s()
    in_line = byte_count <= IN_LINE_BYTES_MAX[encoding]
    body = write() if in_line else await asyncio.to_thread(write)
    context.encode_s = context.app.clock.now_s() - started_s
    context.memory.shrink(len(body))
    return Response(body, media_type="application/json")
