"""The API of Hugging Face's Text Embeddings Inference (TEI).

Its requests name no model: they are answered by the first one that the key may use and that can,
unless they name one in `model`, which is ours. Numbers are floats, and nothing is wrapped.
"""

from collections.abc import Mapping
from functools import partial
from typing import Annotated, Literal, TypeAlias, cast

import msgspec
import numpy as np
from msgspec import Meta, Struct
from starlette.responses import Response

from trivec import __version__
from trivec.api import rerank as documents_rerank
from trivec.api.context import RequestContext
from trivec.api.errors import ErrorShape
from trivec.api.inference import (
    EmbeddedInputs,
    choose_embedder,
    embed,
    read,
    respond,
    tokenizer_turn,
)
from trivec.api.openapi import keyed
from trivec.api.responses import json_response, to_json
from trivec.api.rules import (
    blamed_on,
    check_inputs,
    check_text,
    check_texts,
    choose_prompt,
    of_length_one,
)
from trivec.api.schemas import Dimensions, EmbeddingsRequest, Truncate, doc
from trivec.api.scoring import DOCUMENTS_MAX, rank, score_pairs
from trivec.core.errors import FieldInvalid
from trivec.core.quantisation import cut
from trivec.core.types import Output

TOKEN_ID_MAX = 2**31 - 1
TOKEN_BYTES = 400  # of a token with its text and place, as objects and in JSON
DECODED_TOKEN_BYTES = 64  # of a token's text alone, twice: as a string and in JSON
TokenId: TypeAlias = Annotated[int, Meta(ge=0, le=TOKEN_ID_MAX)]
Inputs: TypeAlias = str | list[str | TokenId | list[TokenId]]
ERROR_TYPES: Mapping[str | None, str] = {
    "internal_error": "Backend",
    **dict.fromkeys(("overloaded", "rate_limit_exceeded", "deadline_exceeded"), "Overloaded"),
    **dict.fromkeys(("draining", "loading", "store_unavailable"), "Unhealthy"),
}


class TeiError(Struct, frozen=True):
    """TEI's shape of every failure."""

    error: str
    error_type: str


TEI = ErrorShape(
    TeiError,
    lambda error, _: TeiError(error.message, ERROR_TYPES.get(error.code, "Validation")),
    statuses={400: 422},
)


class TeiOptions(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What most requests may say; null means unset."""

    model: Annotated[str | None, doc("Ours: the id or alias of a served model.")] = None
    truncate: bool | Truncate | None = None
    truncation_direction: Literal["left", "right"] | None = None

    def cut(self, default: Truncate) -> bool | Truncate:
        """Which side is cut of a text that is too long, if any; *default*: of the key or server."""
        said = default if self.truncate is None else self.truncate
        if self.truncation_direction is None or said in (False, "none"):
            return said
        return "start" if self.truncation_direction == "left" else "end"


class TeiEmbedRequest(TeiOptions, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Body of `/embed`, `/embed_all` and `/embed_sparse`."""

    inputs: Inputs
    prompt_name: str | None = None
    normalize: Annotated[bool | None, doc("The default is true.")] = None
    dimensions: Dimensions | None = None


class TeiRerankRequest(TeiOptions, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Body of `/rerank`; with `documents` in place of `texts` it is that of `/v1/rerank`."""

    query: str
    texts: list[str]
    raw_scores: bool | None = None
    return_text: bool | None = None


class TeiPredictRequest(TeiOptions, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Body of `/predict`: a text, a pair of texts, or a list of lists of one or two."""

    inputs: str | list[str | list[str]]
    raw_scores: bool | None = None


class SimilarityInputs(Struct, frozen=True, forbid_unknown_fields=True):
    """A text, and those that it is compared with."""

    source_sentence: str
    sentences: list[str]


class SimilarityParameters(TeiOptions, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How they are read."""

    prompt_name: str | None = None


class SimilarityRequest(Struct, frozen=True, forbid_unknown_fields=True):
    """Body of `/similarity`."""

    inputs: SimilarityInputs
    parameters: SimilarityParameters | None = None


class TeiTokenizeRequest(Struct, frozen=True, forbid_unknown_fields=True):
    """Body of `/tokenize`."""

    inputs: str | list[str]
    add_special_tokens: bool | None = None
    prompt_name: str | None = None
    model: str | None = None


class DecodeRequest(Struct, frozen=True, forbid_unknown_fields=True):
    """Body of `/decode`."""

    ids: list[TokenId | list[TokenId]]
    skip_special_tokens: bool | None = None
    model: str | None = None


class SparseValue(Struct, frozen=True):
    """One weight of a sparse vector."""

    index: int
    value: float


class Rank(Struct, frozen=True, omit_defaults=True):
    """One text of `/rerank`; `index` is its place in the request."""

    index: int
    score: float
    text: str | None = None


class Prediction(Struct, frozen=True):
    """The score of one class."""

    score: float
    label: str


class SimpleToken(Struct, frozen=True):
    """One token of a text, whose characters are those from `start` to `stop`."""

    id: int
    text: str
    special: bool
    start: int | None
    stop: int | None


class TeiInfo(Struct, frozen=True):
    """Response of `/info`: of the model that answers requests that name none."""

    model_id: str
    model_dtype: str
    model_type: dict[str, dict[str, dict[str, str | int]]]
    max_input_length: int
    max_batch_tokens: int
    max_client_batch_size: int
    auto_truncate: bool
    version: str
    model_sha: str | None = None
    max_concurrent_requests: int | None = None
    tokenization_workers: int | None = None


Sparse: TypeAlias = list[SparseValue]
Tokens: TypeAlias = list[SimpleToken]
Predictions: TypeAlias = list[Prediction | list[Prediction]]


async def embed_dense(context: RequestContext, body: bytes | None = None) -> Response:
    """Turn texts into vectors, as TEI does."""
    asked = await read(TeiEmbedRequest, context, body)
    embedded = await _embed(asked, context, Output.DENSE)
    rows = of_length_one(
        cut(embedded.vectors.dense, asked.dimensions),
        wanted=asked.normalize is not False,
        param="normalize",
    )
    return await respond(context, partial(to_json, rows), byte_count=embedded.response_bytes)


async def embed_sparse(context: RequestContext, body: bytes | None = None) -> Response:
    """Turn texts into sparse vectors, as TEI does."""
    asked = await read(TeiEmbedRequest, context, body)
    embedded = await _embed(asked, context, Output.SPARSE)

    def write() -> bytes:
        rows = [
            map(SparseValue, one.token_ids.tolist(), one.weights.tolist())
            for one in embedded.vectors.sparse
            if one is not None
        ]
        return msgspec.json.encode([list(row) for row in rows])

    return await respond(context, write, byte_count=embedded.response_bytes)


async def embed_all(context: RequestContext) -> Response:
    """Turn texts into a vector a token, by a model that is made for it."""
    asked = await read(TeiEmbedRequest, context)
    embedded = await _embed(asked, context, Output.MULTI)
    rows = [one for one in embedded.vectors.multi if one is not None]

    def write() -> bytes:
        return b"[%b]" % b",".join(map(to_json, rows))

    return await respond(context, write, byte_count=embedded.response_bytes)


async def _embed(asked: TeiEmbedRequest, context: RequestContext, output: Output) -> EmbeddedInputs:
    """The vectors of *asked* of the kind *output*."""
    embedder = choose_embedder(context, asked.model, output)
    is_ids = not isinstance(asked.inputs, str) and not isinstance((asked.inputs or [""])[0], str)
    with blamed_on({"input": "inputs", "output_type": "model"}):
        return await embed(
            EmbeddingsRequest(
                model=asked.model or embedder.card.id,
                input=asked.inputs,
                prompt_name=asked.prompt_name,
                dimensions=asked.dimensions,
                truncate=asked.cut(context.truncate),
                output_type=str(output.name).lower(),
                token_encoding="model" if is_ids else None,
            ),
            context,
        )


async def rerank(context: RequestContext, body: bytes | None = None) -> Response:
    """Order texts by their relevance to a query, as TEI does, or vLLM where they are `documents`."""
    body = await context.read_body() if body is None else body
    if "documents" in _fields(body):
        return await documents_rerank.rerank(context, body)
    asked = await read(TeiRerankRequest, context, body)
    scored = await rank(
        context,
        choose_embedder(context, asked.model, Output.SCORE, ranks=True),
        asked.query,
        asked.texts,
        truncate=asked.cut(context.truncate),
        returns_texts=asked.return_text,
        field="texts",
    )
    best = scored.ranked(raw=asked.raw_scores)
    return json_response(
        [Rank(i, one, asked.texts[i] if asked.return_text else None) for i, one in best.items()]
    )


async def predict(context: RequestContext, body: bytes | None = None) -> Response:
    """Sort texts, or pairs of texts, into a classifier's classes, as TEI does."""
    asked = await read(TeiPredictRequest, context, body)
    given = asked.inputs
    is_batch = not isinstance(given, str) and len(given) > 0 and isinstance(given[0], list)
    items = given if is_batch else [[given] if isinstance(given, str) else given]
    check_texts(items, "inputs", DOCUMENTS_MAX)
    texts: list[list[str]] = []
    for i, item in enumerate(items):
        at = f"inputs[{i}]" if is_batch else "inputs"
        if not isinstance(item, list) or len(item) not in (1, 2) or len(item) != len(items[0]):
            raise FieldInvalid(
                f"Invalid '{at}': send a text, a pair of texts, or lists of one text each, or of "
                "two each.",
                param=at,
            )
        for text in item:
            check_text(text, at)
        texts.append(cast("list[str]", item))
    embedder = choose_embedder(context, asked.model, Output.SCORE)
    if Output.SCORE not in embedder.card.outputs:
        raise FieldInvalid("This model is no classifier and no reranker.", param="model")
    *firsts, seconds = zip(*texts, strict=True)  # no firsts where texts are alone
    scored = await score_pairs(
        context,
        embedder,
        firsts[0] if firsts else None,
        seconds,
        truncate=asked.cut(context.truncate),
        fields=("inputs", "inputs"),
    )
    answers = [
        [
            Prediction(row[label], f"LABEL_{label}")
            for label in sorted(range(len(row)), key=lambda i: -row[i])
        ]
        for row in scored.activated(raw=asked.raw_scores).tolist()
    ]
    return json_response(answers if is_batch else answers[0])


async def similarity(context: RequestContext, body: bytes | None = None) -> Response:
    """Compare a text with others by the cosine of their vectors, as TEI does."""
    asked = await read(SimilarityRequest, context, body)
    options = asked.parameters or SimilarityParameters()
    check_text(asked.inputs.source_sentence, "inputs.source_sentence")
    check_texts(asked.inputs.sentences, "inputs.sentences", DOCUMENTS_MAX)
    embedder = choose_embedder(context, options.model, Output.DENSE)
    if Output.DENSE not in embedder.card.outputs:
        raise FieldInvalid("This model has no dense output.", param="model")
    prompt = choose_prompt(embedder.card, prompt_name=options.prompt_name)
    scored = await score_pairs(
        context,
        embedder,
        [asked.inputs.source_sentence],
        asked.inputs.sentences,
        truncate=options.cut(context.truncate),
        weights={Output.DENSE: 1.0},
        prompts=(prompt, prompt),
        fields=("inputs.source_sentence", "inputs.sentences"),
    )
    return json_response(scored.scores[:, 0].tolist())


async def tokenize(context: RequestContext) -> Response:
    """Cut texts into tokens, as TEI does."""
    asked = await read(TeiTokenizeRequest, context, joins_queue=False)
    embedder = choose_embedder(context, asked.model, Output.DENSE)
    texts = [asked.inputs] if isinstance(asked.inputs, str) else asked.inputs
    prompt = choose_prompt(embedder.card, prompt_name=asked.prompt_name)
    with blamed_on({"input": "inputs"}):
        context.input_count = check_inputs(texts, context.app.limits)
        await context.reservation.acquire()
        async with tokenizer_turn(context):
            found = await embedder.tokenizer.find_tokens(
                [prompt + text for text in texts],
                special_tokens=asked.add_special_tokens is not False,
            )
    token_count = sum(map(len, found))
    context.memory.add(token_count * TOKEN_BYTES, is_response=True)

    def write() -> bytes:
        return msgspec.json.encode([[SimpleToken(*token) for token in tokens] for tokens in found])

    return await respond(context, write, byte_count=token_count * TOKEN_BYTES)


async def decode(context: RequestContext) -> Response:
    """Make texts of token ids, as TEI does."""
    asked = await read(DecodeRequest, context, joins_queue=False)
    embedder = choose_embedder(context, asked.model, Output.DENSE)
    with blamed_on({"input": "ids"}):
        context.input_count = check_inputs(asked.ids, context.app.limits)
        await context.reservation.acquire()
        lists = cast("list[list[int]]", [asked.ids] if isinstance(asked.ids[0], int) else asked.ids)
        byte_count = DECODED_TOKEN_BYTES * sum(map(len, lists))
        context.memory.add(byte_count, is_response=True)
        async with tokenizer_turn(context):
            texts = await embedder.tokenizer.decode(
                [np.array(ids, np.int32) for ids in lists],
                special_tokens=asked.skip_special_tokens is False,
            )
    return await respond(context, partial(msgspec.json.encode, texts), byte_count=byte_count)


async def info(context: RequestContext) -> Response:
    """Tell which model answers requests that name none, and its limits."""
    card, limits = choose_embedder(context, None, Output.DENSE).card, context.app.limits
    kind: dict[str, dict[str, dict[str, str | int]]] = {"embedding": {}}
    if card.labels:
        labels: dict[str, str | int] = {f"LABEL_{i}": i for i in range(card.labels)}
        ids: dict[str, str | int] = {str(i): label for label, i in labels.items()}
        name = "reranker" if card.labels == 1 else "classifier"
        kind = {name: {"id2label": ids, "label2id": labels}}
    return json_response(
        TeiInfo(
            model_id=card.id,
            model_dtype=card.precision,
            model_type=kind,
            max_input_length=card.token_count_max,
            max_batch_tokens=limits.request_tokens_max,
            max_client_batch_size=limits.inputs_max,
            auto_truncate=context.truncate != "none",
            version=__version__,
        )
    )


async def root(context: RequestContext) -> Response:
    """Answer as the route that the fields, or else the model, belong to: for clients of one URL."""
    body = await context.read_body()
    fields = _fields(body)
    if "query" in fields:
        return await rerank(context, body)
    if fields.get("inputs") == b"{":
        return await similarity(context, body)
    outputs = choose_embedder(context, None, Output.DENSE).card.outputs
    if Output.DENSE in outputs:
        return await embed_dense(context, body)
    return await (predict if Output.SCORE in outputs else embed_sparse)(context, body)


def _fields(body: bytes) -> dict[str, bytes]:
    """The fields in *body*, and how each value begins; none where it is not an object."""
    try:
        given = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return {}  # whichever decoder is next says what is wrong
    return {name: bytes(memoryview(value)[:1]) for name, value in given.items()}


OPERATIONS = (
    keyed("/info", info, TeiInfo, None, TEI),
    keyed("/embed", embed_dense, list[list[float]], TeiEmbedRequest, TEI),
    keyed("/embed_sparse", embed_sparse, list[Sparse], TeiEmbedRequest, TEI),
    keyed("/embed_all", embed_all, list[list[list[float]]], TeiEmbedRequest, TEI),
    keyed("/rerank", rerank, list[Rank], TeiRerankRequest, TEI),
    keyed("/predict", predict, Predictions, TeiPredictRequest, TEI),
    keyed("/similarity", similarity, list[float], SimilarityRequest, TEI),
    keyed("/tokenize", tokenize, list[Tokens], TeiTokenizeRequest, TEI),
    keyed("/decode", decode, list[str], DecodeRequest, TEI),
    keyed("/", root, list[list[float]], TeiEmbedRequest, TEI),
)
