"""Rerank, the API of Novita and Jina with Voyage's fields, and score, vLLM's: pairs of texts in, numbers out."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from msgspec import Meta, Struct
from starlette.responses import Response

from trivec.api.context import RequestContext
from trivec.api.inference import choose_embedder, read
from trivec.api.openapi import keyed
from trivec.api.responses import json_response
from trivec.api.rules import OUTPUTS, check_texts, output_names
from trivec.api.schemas import Truncate, Usage, doc, shown
from trivec.api.scoring import DOCUMENTS_MAX, rank, require_one_label, score_pairs
from trivec.core.errors import FieldInvalid
from trivec.core.types import ModelCard, Output, Truncated

PAIRS_OF_FIELDS = (
    ("queries", "documents"),
    ("queries", "items"),
    ("text_1", "text_2"),
    ("data_1", "data_2"),
)


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
    return_documents: Annotated[
        bool | None,
        doc("With the texts; the default is true, or false on a server of Voyage's form."),
    ] = None
    truncate: Annotated[
        bool | Truncate | None,
        doc("Cut a document that is too long; by default it is an error. true is end."),
    ] = None
    truncation: Annotated[
        bool | None, doc("Voyage's word for `truncate`; with it the results are in `data`, too.")
    ] = None
    truncate_prompt_tokens: Annotated[
        Literal[-1] | None, doc("vLLM's word for `truncate`: -1, to what the model reads.")
    ] = None
    raw_scores: Annotated[bool | None, doc("A reranker's logits instead of probabilities.")] = None
    use_activation: Annotated[bool | None, doc("vLLM's word: false is `raw_scores`.")] = None
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
    document: Annotated[Document | str | None, doc("A string in Voyage's form.")] = None
    truncated: Truncated | None = None


class RerankUsage(Usage, frozen=True):
    """Tokens computed, special tokens included; none are generated."""

    completion_tokens: int = 0


class RerankResponse(Struct, frozen=True, omit_defaults=True):
    """Response of `POST /rerank`, the most relevant first; documents of one score as they came.

    In `results`; in `data` alone on a server of Voyage's form, in both where `truncation` is asked.
    """

    id: str
    object: Literal["list"]
    model: str
    usage: RerankUsage
    results: list[RerankResult] | None = None
    data: list[RerankResult] | None = None


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


async def rerank(context: RequestContext, body: bytes | None = None) -> Response:
    """Order documents by their relevance to a query."""
    asked = await read(RerankRequest, context, body)
    context.user = asked.user
    embedder = context.find_embedder(asked.model)
    texts = texts_of(asked.documents)
    if None not in (asked.top_n, asked.top_k) and asked.top_n != asked.top_k:
        says = f"'top_n' is {asked.top_n} and 'top_k' {asked.top_k}. They mean the same: send one."
        raise FieldInvalid(says, param="top_k")
    cuts = (asked.truncate, asked.truncation, asked.truncate_prompt_tokens and "end")
    is_voyage = context.app.limits.rerank_answer == "data"
    with_texts = not is_voyage if asked.return_documents is None else asked.return_documents
    scored = await rank(
        context,
        embedder,
        asked.query,
        texts,
        truncate=next((cut for cut in cuts if cut is not None), None),
        weights=choose_weights(asked.weights, embedder.card),
        returns_texts=with_texts,
    )
    is_raw = asked.use_activation is False if asked.raw_scores is None else asked.raw_scores
    best = scored.ranked(asked.top_n or asked.top_k, raw=is_raw)
    results = []
    for i, score in best.items():
        document = texts[i] if is_voyage else Document(texts[i])
        truncated = scored.truncated.get(i)
        results.append(RerankResult(i, score, document if with_texts else None, truncated))
    response = RerankResponse(
        id=f"rerank-{context.request_id.removeprefix('req_')}",
        object="list",
        model=asked.model,
        usage=RerankUsage(scored.token_count, scored.token_count),
        results=None if is_voyage else results,
        data=results if is_voyage or asked.truncation is not None else None,
    )
    return json_response(response)


def texts_of(documents: Sequence[str | Document]) -> list[str]:
    return [one if isinstance(one, str) else one.text for one in documents]


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


async def score(context: RequestContext) -> Response:
    """Score pairs of texts: one with many, or each with its own."""
    asked = await read(ScoreRequest, context)
    context.user = asked.user
    given = [pair for pair in PAIRS_OF_FIELDS if None not in [getattr(asked, one) for one in pair]]
    if len(given) != 1:
        raise FieldInvalid(
            "Send one pair of fields: 'queries' and 'documents', or 'text_1' and 'text_2'.",
            param="queries",
        )
    [fields] = given
    beside = {one for pair in PAIRS_OF_FIELDS for one in pair if getattr(asked, one) is not None}
    for extra in sorted(beside.difference(fields)):
        says = f"'{extra}' goes with neither '{fields[0]}' nor '{fields[1]}'. Remove it."
        raise FieldInvalid(says, param=extra)
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
    cut = None if asked.truncate_prompt_tokens is None else "end"
    truncate = cut if asked.truncate is None else asked.truncate
    scored = await score_pairs(
        context, embedder, queries, documents, truncate=truncate, fields=fields
    )
    scores = scored.activated(raw=asked.use_activation is False)[:, 0]
    response = ScoreResponse(
        id=f"score-{context.request_id.removeprefix('req_')}",
        object="list",
        created=int(context.app.clock.wall_s()),
        model=asked.model or embedder.card.id,
        data=[Score(i, "score", score) for i, score in enumerate(scores.tolist())],
        usage=RerankUsage(scored.token_count, scored.token_count),
    )
    return json_response(response)


OPERATIONS = (keyed("/rerank", rerank, RerankResponse, RerankRequest),)
VLLM_OPERATIONS = (
    keyed("/v1/score", score, ScoreResponse, ScoreRequest),
    keyed("/score", score, ScoreResponse, ScoreRequest),
)
