"""vLLM's API beside OpenAI's: `/score`, and `/rerank` without a prefix."""

from typing import Annotated, Literal

from msgspec import Struct
from starlette.responses import Response

from trivec.accounts import Scope
from trivec.api import rerank
from trivec.api.context import RequestContext
from trivec.api.inference import check_texts, choose_embedder, choose_long_text, read, score_pairs
from trivec.api.openapi import Operation
from trivec.api.rerank import (
    DOCUMENTS_MAX,
    RerankRequest,
    RerankResponse,
    RerankUsage,
    require_one_label,
)
from trivec.api.responses import json_response
from trivec.api.schemas import Decoder, Truncate, doc
from trivec.core.errors import FieldInvalid
from trivec.core.types import Output

PAIRS_OF_FIELDS = (
    ("queries", "documents"),
    ("queries", "items"),
    ("text_1", "text_2"),
    ("data_1", "data_2"),
)


class ScoreRequest(Struct, frozen=True, forbid_unknown_fields=True):
    """Body of `POST /score`: one pair of fields; null means unset."""

    model: Annotated[str | None, doc("The default is the first reranker that is served.")] = None
    queries: Annotated[str | list[str] | None, doc("One, or one for each document.")] = None
    documents: str | list[str] | None = None
    items: str | list[str] | None = None
    text_1: str | list[str] | None = None
    text_2: str | list[str] | None = None
    data_1: str | list[str] | None = None
    data_2: str | list[str] | None = None
    truncate: bool | Truncate | None = None
    truncate_prompt_tokens: Annotated[
        Literal[-1] | None, doc("-1: cut a document to what the model reads.")
    ] = None
    use_activation: Annotated[bool | None, doc("false: a reranker's logits.")] = None
    user: str | None = None


class Score(Struct, frozen=True):
    """The score of one pair."""

    index: int
    object: Literal["score"]
    score: float


class ScoreResponse(Struct, frozen=True):
    """Response of `POST /score`, in the order of the request."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[Score]
    usage: RerankUsage


_decoder = Decoder(ScoreRequest)


async def score(context: RequestContext) -> Response:
    """Score pairs of texts: one with many, or each with its own."""
    asked = await read(_decoder, context)
    context.user = asked.user
    given = [
        pair
        for pair in PAIRS_OF_FIELDS
        if getattr(asked, pair[0]) is not None and getattr(asked, pair[1]) is not None
    ]
    if len(given) != 1:
        raise FieldInvalid(
            "Send one pair of fields: 'queries' and 'documents', or 'text_1' and 'text_2'.",
            param="queries",
        )
    [fields] = given
    queries, documents = (
        [value] if isinstance(value, str) else value
        for value in (getattr(asked, field) for field in fields)
    )
    check_texts(queries, fields[0], DOCUMENTS_MAX)
    check_texts(documents, fields[1], DOCUMENTS_MAX)
    if len(queries) not in (1, len(documents)):
        raise FieldInvalid(
            f"'{fields[0]}' holds {len(queries)} texts and '{fields[1]}' {len(documents)}. "
            f"Send one, or as many as there are in '{fields[1]}'.",
            param=fields[0],
        )
    embedder = choose_embedder(context, asked.model, Output.SCORE, ranks=True)
    require_one_label(embedder.card)
    truncate = asked.truncate
    if truncate is None and asked.truncate_prompt_tokens is not None:
        truncate = "end"
    scored = await score_pairs(
        context,
        embedder,
        queries,
        documents,
        long_text=choose_long_text(context, truncate),
        fields=fields,
    )
    scores = scored.activated(raw=asked.use_activation is False)[:, 0].tolist()
    tokens = scored.token_count
    response = ScoreResponse(
        id=f"score-{context.request_id.removeprefix('req_')}",
        object="list",
        created=int(context.app.clock.wall_s()),
        model=asked.model or embedder.card.id,
        data=[Score(i, "score", score) for i, score in enumerate(scores)],
        usage=RerankUsage(tokens, tokens),
    )
    return json_response(response)


OPERATIONS = (
    Operation("POST", "/v1/score", score, Scope.EMBED, ScoreResponse, ScoreRequest),
    Operation("POST", "/score", score, Scope.EMBED, ScoreResponse, ScoreRequest),
    Operation("POST", "/rerank", rerank.rerank, Scope.EMBED, RerankResponse, RerankRequest),
)
