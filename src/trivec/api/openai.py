"""The OpenAI API: embeddings, tokenize and models."""

import asyncio
from functools import partial

import msgspec
from starlette.responses import Response

from trivec.api.context import RequestContext
from trivec.api.inference import embed, read, respond, tokenize_input, tokenizer_turn
from trivec.api.openapi import keyed
from trivec.api.responses import INT_TEXT_BYTES, encode_embeddings, json_response
from trivec.api.rules import check_inputs, output_names
from trivec.api.schemas import (
    EmbeddingsRequest,
    EmbeddingsResponse,
    Model,
    ModelList,
    TokenizedText,
    TokenizeRequest,
    TokenizeResponse,
)
from trivec.core.errors import AnswerTooLarge
from trivec.core.types import LongText, ModelCard, Output

TOKEN_STRINGS_IN_LINE_MAX = 8192
TOKEN_BYTES = 48  # an id in an array, as a Python integer in a list, and as text
TOKEN_STRING_BYTES = 72  # its string, in a list


async def embeddings(context: RequestContext) -> Response:
    """Turn texts into vectors."""
    asked = await read(EmbeddingsRequest, context)
    embedded = await embed(asked, context)
    token_strings: list[list[str]] = []
    if asked.return_tokens and Output.SPARSE in embedded.outputs:
        embedder = context.find_embedder(asked.model)
        for vector in embedded.vectors.sparse:
            assert vector is not None, "every sequence was asked for its sparse vector"
            token_strings.append(embedder.tokenizer.token_strings(vector.token_ids))
            await asyncio.sleep(0)  # other requests get a turn after every vector
    write = partial(
        encode_embeddings,
        embedded.vectors,
        embedded.sequences,
        asked=asked,
        outputs=embedded.outputs,
        token_strings=token_strings or None,
        token_encoding=context.token_encoding,
        chunks=context.chunks,
    )
    return await respond(
        context, write, byte_count=embedded.response_bytes, encoding=asked.encoding
    )


async def tokenize(context: RequestContext) -> Response:
    """Count tokens without spending any. A text that would not fit is counted all the same."""
    limits, body = context.app.limits, await context.read_body()
    context.timeout.watch_client()
    async with tokenizer_turn(context):
        asked = await read(TokenizeRequest, context, body, joins_queue=False)
        context.input_count = check_inputs(asked.input, limits)
        embedder = context.find_embedder(asked.model)
        token_count_max = embedder.card.token_count_max
        await context.reservation.acquire()
        sequences = await tokenize_input(asked, embedder, context, long_text=LongText.KEEP)
        token_count = sequences.token_count
        response_bytes = token_count * INT_TEXT_BYTES
        if response_bytes > limits.answer_bytes_max:
            raise AnswerTooLarge(
                answer_bytes=response_bytes, answer_bytes_max=limits.answer_bytes_max
            )
        token_bytes = TOKEN_BYTES + (TOKEN_STRING_BYTES if asked.return_tokens else 0)
        context.memory.add(token_count * token_bytes, is_response=True)
        data = []
        for i in range(len(sequences)):
            start, end = sequences.cu_seqlens[i : i + 2].tolist()
            token_ids = sequences.token_ids[start:end]
            strings = None
            if asked.return_tokens:  # of a long text it takes up to 0.3 s
                is_short = end - start <= TOKEN_STRINGS_IN_LINE_MAX
                find = embedder.tokenizer.token_strings
                strings = find(token_ids) if is_short else await asyncio.to_thread(find, token_ids)
            data.append(
                TokenizedText(
                    object="tokens",
                    index=i,
                    token_ids=token_ids.tolist(),
                    token_count=end - start,
                    fits=end - start <= token_count_max and i not in sequences.truncated,
                    tokens=strings,
                )
            )
            await asyncio.sleep(0)  # other requests get a turn after every text
        counted = TokenizeResponse(
            object="list",
            model=asked.model,
            data=data,
            token_count_max=token_count_max,
            total_tokens=token_count,
            request_tokens_max=limits.request_tokens_max,
            fits=token_count <= limits.request_tokens_max and all(text.fits for text in data),
            token_encoding=context.token_encoding,
        )
        return await respond(
            context, partial(msgspec.json.encode, counted), byte_count=response_bytes
        )


async def list_models(context: RequestContext) -> Response:
    """List the models this key may use."""
    cards = context.app.cards_for(context.known_caller)
    return json_response(ModelList(data=[_model(card, card.id, context) for card in cards]))


async def show_model(context: RequestContext) -> Response:
    """Show one model."""
    name = context.path_params["id"]
    return json_response(_model(context.find_embedder(name).card, name, context))


def _model(card: ModelCard, name: str, context: RequestContext) -> Model:
    return Model(
        id=name,
        created=card.created,
        owned_by=card.owned_by,
        context_size=card.token_count_max,
        dimensions=card.dimensions,
        dimensions_selectable=card.dimensions_selectable,
        matryoshka_dimensions=list(card.matryoshka_dimensions),
        license=card.licence,
        prompts=dict(card.prompts),
        default_prompt_name=card.default_prompt_name,
        labels=card.labels,
        late_chunking=card.late_chunking,
        output_types=output_names(card.outputs),
        truncate=context.truncate,
        precision=card.precision,
        recipe=card.recipe,
        verified=card.verified,
        aliases=list(card.aliases),
        notes=dict(card.notes),
    )


OPERATIONS = (
    keyed("/embeddings", embeddings, EmbeddingsResponse, EmbeddingsRequest),
    keyed("/tokenize", tokenize, TokenizeResponse, TokenizeRequest),
    keyed("/models", list_models, ModelList),
    keyed("/models/{id:path}", show_model, Model),
)
