"""OpenAI's face: embeddings, tokenize and models, and the rules of a request that no type can hold."""

import asyncio
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar, cast

import msgspec
import numpy as np
from starlette.requests import Request
from starlette.responses import Response

from trivec.accounts import RequestMeta, Scope
from trivec.api.body import read_body
from trivec.api.context import CONTEXT, AppState, RequestContext
from trivec.api.openapi import Operation
from trivec.api.responses import (
    IN_LINE_BYTES_MAX,
    INT_TEXT_BYTES,
    ApiResponse,
    Encoding,
    encode_embeddings,
    estimate_bytes,
    json_response,
)
from trivec.api.schemas import (
    Decoder,
    EmbeddingsAnswer,
    EmbeddingsRequest,
    Input,
    Model,
    ModelList,
    TokenizeAnswer,
    TokenizedText,
    TokenizeRequest,
    shown,
)
from trivec.core.errors import (
    AnswerTooLarge,
    FieldInvalid,
    Overloaded,
    RequestTooLarge,
    TokenIdUnknown,
)
from trivec.core.ports import Texts, TokenLists
from trivec.core.types import LongText, ModelCard, Output
from trivec.settings import HttpLimits

Parsed = TypeVar("Parsed", EmbeddingsRequest, TokenizeRequest)

PARSE_IN_LINE_BYTES_MAX = 256 * 1024  # larger bodies are parsed in a thread
OTHER_ITEMS_MAX = 64  # texts, lists and commas of a request's other fields
LARGE_TOKENIZE_BYTES = 64 * 1024  # of a body; smaller ones need not wait for others
LARGE_TOKENIZE_WAITING_MAX = 4
TOKEN_BYTES = 48  # an id in an array, as a Python integer in a list, and as text
TOKEN_STRING_BYTES = 72  # its string, in a list
OUTPUTS = {
    "dense": Output.DENSE,
    "sparse": Output.SPARSE,
    "multi": Output.MULTI,
    "colbert": Output.MULTI,
}
LONG_TEXT: Mapping[bool | str, LongText] = {
    False: LongText.REFUSE,
    "none": LongText.REFUSE,
    True: LongText.CUT_END,
    "end": LongText.CUT_END,
    "start": LongText.CUT_START,
}
_embeddings_decoder = Decoder(EmbeddingsRequest)
_tokenize_decoder = Decoder(TokenizeRequest)


@dataclass(frozen=True, slots=True)
class Inputs:
    """What is to be tokenised: texts, or token ids that are not yet held to a vocabulary."""

    texts: Texts | None
    token_lists: Sequence[Sequence[int]] | None = None
    is_flat: bool = False  # the ids of one text, sent without a list around them

    def __len__(self) -> int:
        return len(self.texts if self.texts is not None else self.token_lists or ())

    def for_model(self, card: ModelCard) -> Texts | TokenLists:
        """The texts, or the ids as int32 `[tokens]` a list; `TokenIdUnknown` for a foreign id."""
        if self.texts is not None:
            return self.texts
        vocabulary_size = card.vocabulary_size
        arrays = []
        for i, ids in enumerate(self.token_lists or ()):
            try:
                array = np.array(ids, np.int64)  # [tokens]
                is_foreign = bool(((array < 0) | (array >= vocabulary_size)).any())
            except OverflowError:
                is_foreign = True
            if is_foreign:
                at = next(k for k, one in enumerate(ids) if not 0 <= one < vocabulary_size)
                param = f"input[{at}]" if self.is_flat else f"input[{i}][{at}]"
                raise TokenIdUnknown(token_id=ids[at], vocabulary_size=vocabulary_size, param=param)
            arrays.append(array.astype(np.int32))
        return arrays


async def embeddings(request: Request) -> Response:
    """`POST /embeddings`: whatever can be refused is refused before the model is touched."""
    context: RequestContext = request.scope[CONTEXT]
    app, clock, limits = context.app, context.app.clock, context.app.limits
    body = await read_body(context)
    app.check_any_model_has_room()  # after reading: a connection with an unread body is lost
    asked, inputs = await parse(_embeddings_decoder, body, limits)
    del body
    outputs = parse_outputs(asked.output_type)
    encoding: Encoding = asked.encoding_format or "float"
    context.user, context.input_count = asked.user, len(inputs)
    embedder = context.find_embedder(asked.model)
    card = embedder.card
    check_against_card(outputs, asked.dimensions, card)

    def estimate(tokens: int) -> tuple[int, int]:
        return estimate_bytes(
            outputs,
            encoding,
            rows=len(inputs),
            tokens=tokens,
            width=card.dimensions,
            dimensions=asked.dimensions,
            with_strings=bool(asked.return_tokens),
        )

    least_bytes = sum(estimate(len(inputs)))  # before the work of tokenising
    context.memory.add_answer(least_bytes)
    assert context.timeout is not None, "the route bounds its time"
    context.timeout.watch_client()
    await reserve(context, tokens_follow=True)

    started_s = clock.now_s()
    truncate = asked.truncate
    if truncate is None:
        truncate = context.known_caller.truncate or limits.truncate
    sequences = await embedder.tokenize(
        inputs.for_model(card),
        long_text=LONG_TEXT[truncate],
        are_own=asked.token_encoding is not None,
    )
    context.tokenize_s = clock.now_s() - started_s
    token_count = sequences.token_count
    if token_count > limits.request_tokens_max:
        raise RequestTooLarge(token_count=token_count, token_count_max=limits.request_tokens_max)
    answer_bytes, vector_bytes = estimate(token_count)
    check_answer_fits(answer_bytes, limits)
    context.memory.add_answer(answer_bytes + vector_bytes - least_bytes)
    assert context.reservation is not None
    await context.reservation.reserve_tokens(token_count)

    reply = await embedder.embed(sequences, outputs, deadline_s=context.deadline_s - clock.now_s())
    context.token_count = token_count
    context.queue_s, context.compute_s = reply.queue_s, reply.compute_s
    token_strings: list[list[str]] | None = None
    if asked.return_tokens and Output.SPARSE in outputs:
        token_strings = []
        for vector in reply.vectors.sparse:
            assert vector is not None, "every sequence was asked for its sparse vector"
            token_strings.append(embedder.token_strings(vector.token_ids))
            await asyncio.sleep(0)  # other requests get a turn after every vector

    started_s = clock.now_s()

    def encode() -> ApiResponse:
        return ApiResponse(
            encode_embeddings(
                reply.vectors,
                sequences,
                model=asked.model,
                outputs=outputs,
                encoding=encoding,
                dimensions=asked.dimensions,
                token_strings=token_strings,
            )
        )

    in_line = answer_bytes <= IN_LINE_BYTES_MAX[encoding]
    response = encode() if in_line else await asyncio.to_thread(encode)
    context.encode_s = clock.now_s() - started_s
    context.memory.shrink(response.byte_count)
    return response


async def tokenize(request: Request) -> Response:
    """`POST /tokenize`: counting tokens without spending any.

    A large request waits for its turn, for it takes the tokenizer's threads from embeddings.
    """
    context: RequestContext = request.scope[CONTEXT]
    app = context.app
    _check_tokenize_has_room(app, context.declared_bytes)  # if need be, with the body unread
    body = await read_body(context)
    assert context.timeout is not None, "the route bounds its time"
    context.timeout.watch_client()
    if len(body) < LARGE_TOKENIZE_BYTES:
        return await _count_tokens(context, body)
    _check_tokenize_has_room(app, len(body))
    app.large_tokenize_waiting += 1
    try:
        await app.large_tokenize.acquire()
    finally:
        app.large_tokenize_waiting -= 1
    try:
        return await _count_tokens(context, body)
    finally:
        app.large_tokenize.release()


def _check_tokenize_has_room(app: AppState, body_bytes: int) -> None:
    waiting_max = LARGE_TOKENIZE_WAITING_MAX
    if body_bytes >= LARGE_TOKENIZE_BYTES and app.large_tokenize_waiting >= waiting_max:
        raise Overloaded(
            f"{waiting_max} large requests to tokenize are waiting, which is the most. "
            "Please try again shortly, with fewer inputs at a time.",
            retry_after_s=random.uniform(5, 10),  # noqa: S311 # not all at once again
        )


async def _count_tokens(context: RequestContext, body: bytes) -> Response:
    """A text that would not fit is counted all the same, and said not to fit."""
    clock, limits = context.app.clock, context.app.limits
    asked, inputs = await parse(_tokenize_decoder, body, limits)
    context.input_count = len(inputs)
    embedder = context.find_embedder(asked.model)
    card = embedder.card
    await reserve(context)
    started_s = clock.now_s()
    sequences = await embedder.tokenize(
        inputs.for_model(card),
        long_text=LongText.KEEP,
        are_own=asked.token_encoding is not None,
    )
    context.tokenize_s = clock.now_s() - started_s
    token_count = sequences.token_count
    answer_bytes = token_count * INT_TEXT_BYTES
    check_answer_fits(answer_bytes, limits)
    token_bytes = TOKEN_BYTES + (TOKEN_STRING_BYTES if asked.return_tokens else 0)
    context.memory.add_answer(token_count * token_bytes)
    data = []
    for i in range(len(sequences)):
        start, end = sequences.cu_seqlens[i : i + 2].tolist()
        token_ids = sequences.token_ids[start:end]
        data.append(
            TokenizedText(
                object="tokens",
                index=i,
                token_ids=token_ids.tolist(),
                token_count=end - start,
                fits=end - start <= card.token_count_max and i not in sequences.truncated,
                tokens=embedder.token_strings(token_ids) if asked.return_tokens else None,
            )
        )
        await asyncio.sleep(0)  # other requests get a turn after every text
    fits = token_count <= limits.request_tokens_max and all(text.fits for text in data)
    answer = TokenizeAnswer(
        object="list",
        model=asked.model,
        data=data,
        token_count_max=card.token_count_max,
        total_tokens=token_count,
        request_tokens_max=limits.request_tokens_max,
        fits=fits,
    )
    if answer_bytes <= IN_LINE_BYTES_MAX["float"]:
        response = json_response(answer)
    else:
        response = await asyncio.to_thread(json_response, answer)
    context.memory.shrink(response.byte_count)
    return response


async def list_models(request: Request) -> Response:
    """`GET /models`: the models that the key may use."""
    context: RequestContext = request.scope[CONTEXT]
    cards = context.app.cards_for(context.known_caller)
    return json_response(ModelList(data=[_model(card, card.id, context) for card in cards]))


async def show_model(request: Request) -> Response:
    """`GET /models/{id}`: one model, by its id or an alias."""
    context: RequestContext = request.scope[CONTEXT]
    name = request.path_params["id"]
    return json_response(_model(context.find_embedder(name).card, name, context))


def _model(card: ModelCard, name: str, context: RequestContext) -> Model:
    return Model(
        id=name,
        created=card.created,
        owned_by=card.owned_by,
        context_size=card.token_count_max,
        dimensions=card.dimensions,
        dimensions_selectable=card.dimensions_selectable,
        output_types=output_words(card.outputs),
        truncate=context.known_caller.truncate or context.app.limits.truncate,
        precision=card.precision,
        recipe=card.recipe,
        verified=card.verified,
        aliases=list(card.aliases),
        notes=dict(card.notes),
    )


async def reserve(context: RequestContext, *, tokens_follow: bool = False) -> None:
    """Take one request out of the key's rate limits. Raises `RateLimitExceeded`, `StoreUnavailable`.

    *tokens_follow*: `reserve_tokens` is called next, and may be what takes it.
    """
    meta = RequestMeta(request_id=context.request_id, model=context.model)
    context.reservation = context.app.accounts.reserve(context.known_caller, meta)
    await context.reservation.acquire(tokens_follow=tokens_follow)


def check_answer_fits(answer_bytes: int, limits: HttpLimits) -> None:
    """Raise `AnswerTooLarge` for an estimate over the limit."""
    if answer_bytes > limits.answer_bytes_max:
        raise AnswerTooLarge(answer_bytes=answer_bytes, answer_bytes_max=limits.answer_bytes_max)


async def parse(decoder: Decoder[Parsed], body: bytes, limits: HttpLimits) -> tuple[Parsed, Inputs]:
    """The request in *body*, and its inputs. Raises `MalformedBody`, `FieldInvalid`,
    `RequestTooLarge`.
    """

    def decode() -> tuple[Parsed, Inputs]:
        refuse_too_many_items(body, limits)
        asked = decoder.decode(body)
        return asked, check_inputs(asked.input, limits)

    in_line = len(body) <= PARSE_IN_LINE_BYTES_MAX
    return decode() if in_line else await asyncio.to_thread(decode)


def refuse_too_many_items(body: bytes, limits: HttpLimits) -> None:
    """Refuse an `input` that is far too long before millions of objects are made of it.

    8 MiB of `[],` take the decoder a second, in which it holds the interpreter's lock, and 200 MB;
    counting the punctuation outside its strings takes about 20 ms. What passes is counted exactly
    once it is decoded. A body shorter than the limit cannot hold more.
    """
    if len(body) <= limits.request_tokens_max:
        return
    if b"\\" in body:
        body = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    characters = np.frombuffer(body, np.uint8)
    quotes = characters == ord('"')
    is_outside = np.bitwise_xor.accumulate(quotes.view(np.uint8)) == 0
    texts = int(np.count_nonzero(quotes)) // 2
    arrays = int(np.count_nonzero((characters == ord("[")) & is_outside))
    commas = int(np.count_nonzero((characters == ord(",")) & is_outside))
    if max(texts, arrays) > limits.inputs_max + OTHER_ITEMS_MAX:
        raise _array_too_long(f"one of about {max(texts, arrays)}", limits)
    if commas > limits.request_tokens_max + limits.inputs_max + OTHER_ITEMS_MAX:
        raise RequestTooLarge(token_count=commas, token_count_max=limits.request_tokens_max)


def check_inputs(given: Input, limits: HttpLimits) -> Inputs:
    """One of the four legal forms of `input`, or the refusal that names the item at fault."""
    if isinstance(given, str):
        if not given:
            raise _empty("input", "string")
        return Inputs(texts=[given])
    if not given:
        raise _empty("input", "array")
    kind = type(given[0])
    if len(set(map(type, given))) > 1:
        i = next(i for i, item in enumerate(given) if type(item) is not kind)
        raise FieldInvalid(
            f"Invalid 'input[{i}]': all inputs must be of one kind. "
            "Send texts, or token ids, or lists of token ids.",
            param=f"input[{i}]",
        )
    if kind is int:
        inputs = Inputs(texts=None, token_lists=[cast("list[int]", given)], is_flat=True)
    else:
        if len(given) > limits.inputs_max:
            raise _array_too_long(f"an array with length {len(given)}", limits)
        for i, item in enumerate(given):
            if not item:
                raise _empty(f"input[{i}]", "string" if kind is str else "array")
        if kind is str:
            return Inputs(texts=cast("list[str]", given))
        inputs = Inputs(texts=None, token_lists=cast("list[list[int]]", given))
    token_count = sum(map(len, inputs.token_lists or ()))
    if token_count > limits.request_tokens_max:
        raise RequestTooLarge(token_count=token_count, token_count_max=limits.request_tokens_max)
    return inputs


def parse_outputs(words: str | Sequence[str] | None) -> Output:
    """The outputs that `output_type` asks for; dense where it is unset."""
    if words is None:
        return Output.DENSE
    outputs = Output(0)
    for joined in [words] if isinstance(words, str) else words:
        for word in joined.split("&"):
            if word.lower() not in OUTPUTS:
                raise FieldInvalid(
                    f"Invalid value for 'output_type' = {shown(word)}. "
                    f"Supported values: {list(OUTPUTS)}, or several of them joined by '&'.",
                    param="output_type",
                )
            outputs |= OUTPUTS[word.lower()]
    if not outputs:
        raise FieldInvalid(
            f"Invalid 'output_type': empty array. Supported values: {list(OUTPUTS)}.",
            param="output_type",
        )
    return outputs


def output_words(outputs: Output) -> list[str]:
    """The public names of *outputs*, as `/models` lists them."""
    return [word for word in ("dense", "sparse", "multi") if OUTPUTS[word] in outputs]


def check_against_card(outputs: Output, dimensions: int | None, card: ModelCard) -> None:
    """Raise `FieldInvalid` for outputs or dimensions that the model does not have."""
    if absent := outputs & ~card.outputs:
        raise FieldInvalid(
            f"This model has no {' and no '.join(output_words(absent))} "
            f"output; it has {', '.join(output_words(card.outputs))}.",
            param="output_type",
        )
    if dimensions in (None, card.dimensions):  # to ask for them all changes nothing
        return
    if not card.dimensions_selectable:
        raise FieldInvalid("This model does not support specifying dimensions.", param="dimensions")
    if dimensions > card.dimensions:
        raise FieldInvalid(
            f"Invalid value for 'dimensions' = {dimensions}. "
            f"This model's vectors have {card.dimensions}.",
            param="dimensions",
        )


def _empty(param: str, what: str) -> FieldInvalid:
    return FieldInvalid(
        f"Invalid '{param}': empty {what}. Send at least one character or token id.", param=param
    )


def _array_too_long(found: str, limits: HttpLimits) -> FieldInvalid:
    return FieldInvalid(
        "Invalid 'input': array too long. Expected an array with maximum length "
        f"{limits.inputs_max}, but got {found} instead.",
        param="input",
    )


OPERATIONS = (
    Operation(
        "POST",
        "/embeddings",
        embeddings,
        "Turn texts into vectors",
        EmbeddingsAnswer,
        reads=EmbeddingsRequest,
        scope=Scope.EMBED,
    ),
    Operation(
        "POST",
        "/tokenize",
        tokenize,
        "Count tokens without spending any",
        TokenizeAnswer,
        reads=TokenizeRequest,
        scope=Scope.EMBED,
    ),
    Operation(
        "GET",
        "/models",
        list_models,
        "List the models this key may use",
        ModelList,
        scope=Scope.EMBED,
    ),
    Operation("GET", "/models/{id:path}", show_model, "Show one model", Model, scope=Scope.EMBED),
)
