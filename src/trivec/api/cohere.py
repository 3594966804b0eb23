"""Cohere's API: `/v2/rerank`, `/v2/embed`, and `/v1/embed`, which LangChain's class still asks.

Its first version's `/v1/rerank` reads and says what ours does. Texts are cut at the end, its own
default, unless a request says NONE; the answer warns of each that was.
"""

from collections.abc import Mapping
from math import ceil
from typing import Annotated, Literal, TypeAlias

import msgspec
from msgspec import Meta, Struct
from starlette.responses import Response

from trivec.api.context import RequestContext
from trivec.api.errors import ErrorShape
from trivec.api.inference import embed, read, respond
from trivec.api.openapi import keyed
from trivec.api.rerank import Document, RerankResult, texts_of
from trivec.api.responses import FLOAT_TEXT_BYTES, json_response, to_base64, to_json
from trivec.api.rules import blamed_on
from trivec.api.schemas import Dimensions, EmbeddingsRequest, InputType, Truncate, doc
from trivec.api.scoring import rank
from trivec.core.errors import FieldInvalid
from trivec.core.quantisation import cut, quantise
from trivec.core.types import Truncated

SEARCH_UNIT_DOCUMENTS = 100  # Cohere's unit of billing
DOCUMENT_TOKENS_MAX = 4096  # Cohere's default
WARNINGS_MAX = 20
EmbeddingType: TypeAlias = Literal["float", "int8", "uint8", "binary", "ubinary", "base64"]
Priority: TypeAlias = Annotated[int, Meta(ge=0, le=999)]


class CohereError(Struct, frozen=True):
    """Cohere's shape of every failure."""

    message: str
    id: str


COHERE = ErrorShape(CohereError, lambda error, request_id: CohereError(error.message, request_id))


class CohereRerankRequest(Struct, frozen=True, forbid_unknown_fields=True):
    """Body of `POST /v2/rerank`; null means unset."""

    model: str
    query: str
    documents: list[str | Document]
    top_n: Annotated[int, Meta(ge=1)] | None = None
    max_tokens_per_doc: Annotated[
        Annotated[int, Meta(ge=1)] | None, doc(f"The default is {DOCUMENT_TOKENS_MAX}.")
    ] = None
    return_documents: bool | None = None
    priority: Annotated[Priority | None, doc("No effect: requests are served in fairness.")] = None


class CohereEmbedRequest(Struct, frozen=True, forbid_unknown_fields=True):
    """Body of `POST /v2/embed`; null means unset."""

    model: str
    input_type: InputType | None = None
    texts: list[str] | None = None
    inputs: Annotated[
        list["CohereInput"] | None, doc("Texts in Cohere's structure, instead of `texts`.")
    ] = None
    max_tokens: Annotated[int, Meta(ge=1)] | None = None
    output_dimension: Dimensions | None = None
    embedding_types: Annotated[list[EmbeddingType] | None, doc("The default is float.")] = None
    truncate: Annotated[Truncate | None, doc("The default is end.")] = None
    priority: Annotated[Priority | None, doc("No effect: requests are served in fairness.")] = None


class CohereText(Struct, frozen=True, forbid_unknown_fields=True):
    """A part of an input; images are not read."""

    type: Literal["text"]
    text: str


class CohereInput(Struct, frozen=True, forbid_unknown_fields=True):
    """One input in parts, which make one text."""

    content: list[CohereText]


class CohereMeta(Struct, frozen=True, omit_defaults=True):
    """What an answer cost, and which texts were cut for it."""

    api_version: dict[str, str]
    billed_units: dict[str, int]
    tokens: dict[str, int]
    warnings: list[str] | None = None


class CohereRerankResponse(Struct, frozen=True):
    """Response of `POST /v2/rerank`, the most relevant first."""

    id: str
    results: list[RerankResult]
    meta: CohereMeta


class CohereEmbedResponse(Struct, frozen=True):
    """Response of `POST /v2/embed`: of each type that was asked for, one a text.

    Only `/v1/embed` answers with plain floats, where no type was asked for.
    """

    id: str
    response_type: Literal["embeddings_by_type", "embeddings_floats"]
    embeddings: dict[EmbeddingType, list[list[float] | str]] | list[list[float]]
    texts: list[str]
    meta: CohereMeta


async def rerank(context: RequestContext) -> Response:
    """Order documents by their relevance to a query, as Cohere does."""
    asked = await read(CohereRerankRequest, context)
    texts = texts_of(asked.documents)
    scored = await rank(
        context,
        context.find_embedder(asked.model),
        asked.query,
        texts,
        truncate="end",
        document_tokens_max=asked.max_tokens_per_doc or DOCUMENT_TOKENS_MAX,
        returns_texts=asked.return_documents,
    )
    results = [
        RerankResult(i, score, Document(texts[i]) if asked.return_documents else None)
        for i, score in scored.ranked(asked.top_n).items()
    ]
    units = {"search_units": ceil(len(texts) / SEARCH_UNIT_DOCUMENTS)}
    meta = _meta(units, scored.token_count, scored.truncated, "documents")
    return json_response(CohereRerankResponse(context.request_id, results, meta))


async def embed_v1(context: RequestContext) -> Response:
    """Turn texts into vectors, as Cohere's first version does."""
    asked = await read(CohereEmbedRequest, context)
    return await _embed(asked, context, by_type=asked.embedding_types is not None)


async def embed_v2(context: RequestContext) -> Response:
    """Turn texts into vectors, as Cohere does."""
    return await _embed(await read(CohereEmbedRequest, context), context, by_type=True)


async def _embed(asked: CohereEmbedRequest, context: RequestContext, *, by_type: bool) -> Response:
    if (asked.texts is None) == (asked.inputs is None):
        raise FieldInvalid("Send either 'texts' or 'inputs'.", param="texts")
    field, texts = "texts", asked.texts
    if texts is None:
        assert asked.inputs is not None
        field = "inputs"
        texts = ["\n".join(part.text for part in one.content) for one in asked.inputs]
    types = tuple(dict.fromkeys(asked.embedding_types or ("float",)))
    packs = next((one for one in ("binary", "ubinary") if one in types), None)
    request = EmbeddingsRequest(
        model=asked.model,
        input=list(texts),
        input_type=asked.input_type,
        output_dimension=asked.output_dimension,
        output_type="dense",
        output_dtype=packs,
        truncate=asked.truncate or "end",
        truncate_prompt_tokens=None if asked.truncate == "none" else asked.max_tokens,
    )
    names = {"input": field, "output_dtype": "embedding_types", "output_type": "model"}
    with blamed_on({**names, "truncate_prompt_tokens": "max_tokens"}):
        embedded = await embed(request, context)
    rows = cut(embedded.vectors.dense, asked.output_dimension)
    byte_count = len(types) * rows.size * FLOAT_TEXT_BYTES
    context.memory.add(byte_count, is_response=True)
    tokens = context.token_count
    meta = _meta({"input_tokens": tokens}, tokens, embedded.sequences.truncated, field)

    def write() -> bytes:
        found: dict[str, msgspec.Raw] = {}
        for kind in types:
            if kind == "base64":
                written = b"[%b]" % b",".join(map(to_base64, rows))
            else:
                written = to_json(rows if kind == "float" else quantise(rows, kind))
            found[kind] = msgspec.Raw(written)
        return msgspec.json.encode(
            {
                "id": context.request_id,
                "response_type": "embeddings_by_type" if by_type else "embeddings_floats",
                "embeddings": found if by_type else found["float"],
                "texts": texts,
                "meta": meta,
            }
        )

    return await respond(context, write, byte_count=byte_count)


def _meta(
    units: dict[str, int], tokens: int, truncated: Mapping[int, Truncated], field: str
) -> CohereMeta:
    """What was used, and which of the texts in *field* were cut."""
    warnings = [
        f"{field}[{i}] was cut to {one.kept_tokens} tokens"
        for i, one in list(truncated.items())[:WARNINGS_MAX]
    ]
    return CohereMeta({"version": "2"}, units, {"input_tokens": tokens}, warnings or None)


OPERATIONS = (
    keyed("/v2/rerank", rerank, CohereRerankResponse, CohereRerankRequest, COHERE),
    keyed("/v1/embed", embed_v1, CohereEmbedResponse, CohereEmbedRequest, COHERE),
    keyed("/v2/embed", embed_v2, CohereEmbedResponse, CohereEmbedRequest, COHERE),
)
