"""The rerank API of Novita and Jina, with Voyage's fields: documents in the order of relevance."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import numpy as np
from msgspec import Meta, Struct
from starlette.responses import Response

from trivec.accounts import Scope
from trivec.api.context import RequestContext
from trivec.api.inference import (
    PairScores,
    check_text,
    check_texts,
    choose_long_text,
    read,
    score_pairs,
)
from trivec.api.openai import OUTPUTS, choose_prompt, output_names
from trivec.api.openapi import Operation
from trivec.api.responses import json_response
from trivec.api.schemas import Decoder, InputType, TokenizeRequest, Truncate, doc, shown
from trivec.core.errors import FieldInvalid
from trivec.core.ports import Embedder
from trivec.core.types import ModelCard, Output, Truncated

DOCUMENTS_MAX = 1000
INPUT_TYPES: tuple[InputType, InputType] = ("query", "document")


class Document(Struct, frozen=True):
    """A document's text."""

    text: str


class RerankRequest(Struct, frozen=True, forbid_unknown_fields=True):
    """Body of `POST /rerank`; null means unset."""

    model: Annotated[str, doc("The id or alias of a served model.", ["baai/bge-reranker-v2-m3"])]
    query: str
    documents: Annotated[
        list[str | Document], doc(f"1 to {DOCUMENTS_MAX} texts, plain or as objects with `text`.")
    ]
    top_n: Annotated[
        Annotated[int, Meta(ge=0)] | None, doc("How many of the best to return; 0 is all.")
    ] = None
    top_k: Annotated[Annotated[int, Meta(ge=0)] | None, doc("The same as `top_n`.")] = None
    return_documents: Annotated[bool | None, doc("With the texts; the default is true.")] = None
    truncate: Annotated[
        bool | Truncate | None,
        doc("Cut a document that is too long; by default it is an error. true is end."),
    ] = None
    truncation: Annotated[
        bool | None, doc("Voyage's word for `truncate`; with it the results are in `data`, too.")
    ] = None
    raw_scores: Annotated[bool | None, doc("A reranker's logits instead of probabilities.")] = None
    weights: Annotated[
        dict[str, Annotated[float, Meta(ge=0, le=1e6)]] | None,
        doc(
            "Of a model without a head for scores: what the scores of its vectors count for.",
            [{"dense": 1.0, "sparse": 0.3, "multi": 1.0}],
        ),
    ] = None
    user: Annotated[str | None, doc("Kept as a hash in the ledger, and nowhere else.")] = None


class RerankResult(Struct, frozen=True, omit_defaults=True):
    """One document; `index` is its place in the request."""

    index: int
    relevance_score: float
    document: Document | None = None
    truncated: Truncated | None = None


class RerankUsage(Struct, frozen=True):
    """Tokens computed, special tokens included."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: int = 0


class RerankResponse(Struct, frozen=True, omit_defaults=True):
    """Response of `POST /rerank`, the most relevant first; documents of one score as they came."""

    id: str
    object: Literal["list"]
    model: str
    results: list[RerankResult]
    usage: RerankUsage
    data: list[RerankResult] | None = None


_decoder = Decoder(RerankRequest)


async def rerank(context: RequestContext, body: bytes | None = None) -> Response:
    """Order documents by their relevance to a query."""
    asked = await read(_decoder, context, body)
    context.user = asked.user
    embedder = context.find_embedder(asked.model)
    texts = [one if isinstance(one, str) else one.text for one in asked.documents]
    truncate = asked.truncation if asked.truncate is None else asked.truncate
    with_texts = asked.return_documents is not False
    scored = await rank(
        context,
        embedder,
        asked.query,
        texts,
        truncate=truncate,
        weights=choose_weights(asked.weights, embedder.card),
        with_texts=with_texts,
    )
    scores = scored.activated(raw=bool(asked.raw_scores))[:, 0].tolist()
    results = [
        RerankResult(
            i,
            scores[i],
            Document(texts[i]) if with_texts else None,
            scored.truncated.get(i),
        )
        for i in best_first(scores, asked.top_n or asked.top_k)
    ]
    tokens = scored.token_count
    response = RerankResponse(
        id=f"rerank-{context.request_id.removeprefix('req_')}",
        object="list",
        model=asked.model,
        results=results,
        usage=RerankUsage(tokens, tokens),
        data=None if asked.truncation is None else results,
    )
    return json_response(response)


async def rank(
    context: RequestContext,
    embedder: Embedder,
    query: str,
    texts: Sequence[str],
    *,
    truncate: bool | str | None,
    document_tokens_max: int | None = None,
    weights: Mapping[Output, float] | None = None,
    with_texts: bool = False,
    field: str = "documents",
) -> PairScores:
    """Scores of *texts*, which came in *field*, for one *query*. Raises `FieldInvalid` as well.

    A model that has prompts for queries and documents compares the vectors of texts behind them.
    """
    check_text(query, "query")
    check_texts(texts, field, DOCUMENTS_MAX)
    card = embedder.card
    require_one_label(card)
    of_query, of_document = (
        choose_prompt(TokenizeRequest(card.id, "", input_type=kind), card, are_texts=True)
        for kind in INPUT_TYPES
    )
    return await score_pairs(
        context,
        embedder,
        [query],
        texts,
        long_text=choose_long_text(context, truncate),
        document_tokens_max=document_tokens_max,
        weights=weights,
        prompts=(of_query, of_document),
        response_bytes=2 * sum(map(len, texts)) if with_texts else 0,
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


def choose_weights(
    given: Mapping[str, float] | None, card: ModelCard
) -> Mapping[Output, float] | None:
    """*given* by output, without those of no weight. Raises `FieldInvalid` where one is unknown."""
    if given is None:
        return None
    weights = {}
    for name, weight in given.items():
        output = OUTPUTS.get(name)
        if output is None or output not in card.outputs:
            raise FieldInvalid(
                f"Invalid value for 'weights': this model has no {shown(name)} output; "
                f"it has {', '.join(output_names(card.outputs))}.",
                param="weights",
            )
        if weight > 0:
            weights[output] = weight
    if not weights:
        raise FieldInvalid("Invalid 'weights': no weight is above 0.", param="weights")
    return weights


def best_first(scores: Sequence[float], count: int | None) -> list[int]:
    """Places of the *count* largest *scores*, or of all; ties in their order."""
    order: list[int] = np.argsort(-np.array(scores), kind="stable").tolist()
    return order[: count or len(order)]


OPERATIONS = (Operation("POST", "/rerank", rerank, Scope.EMBED, RerankResponse, RerankRequest),)
