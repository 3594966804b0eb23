"""A face in one file: its route, its types and its handler, registered by `OPERATIONS` alone."""

import msgspec
from starlette.responses import Response

from trivec.accounts import Scope
from trivec.api.context import RequestContext
from trivec.api.openapi import Operation
from trivec.api.responses import json_response
from trivec.api.schemas import Decoder
from trivec.core.types import LongText, Output


class ToyRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What `POST /toy/embed` understands."""

    model: str
    text: str


class ToyResponse(msgspec.Struct, frozen=True):
    """The response of `POST /toy/embed`."""

    vector: list[float]


_decoder = Decoder(ToyRequest)


async def embed(context: RequestContext) -> Response:
    """Turn one text into a vector."""
    asked = _decoder.decode(await context.read_body())
    embedder = context.find_embedder(asked.model)
    context.timeout.watch_client()
    await context.reservation.acquire(tokens_follow=True)
    sequences = await embedder.tokenizer.tokenize([asked.text], long_text=LongText.REFUSE)
    await context.reservation.reserve_tokens(sequences.token_count)
    reply = await embedder.embed(sequences, Output.DENSE)
    context.input_count, context.token_count = 1, sequences.token_count
    return json_response(ToyResponse(reply.vectors.dense[0].tolist()))


async def echo(context: RequestContext) -> Response:
    """Answer with the text, to anyone."""
    return json_response(_decoder.decode(await context.read_body()).text)


OPERATIONS = (
    Operation("POST", "/toy/embed", embed, Scope.EMBED, ToyResponse, ToyRequest),
    Operation("POST", "/toy/echo", echo, None, None, ToyRequest),
)
