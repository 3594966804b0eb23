"""Rerank: by a head for scores, by three vectors, by cosine; and what it says of it."""

import asyncio
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import pytest
from tests.accounts.requests import statuses
from tests.api.house import CLASSIFIER, MODEL, PLAIN_MODEL, RERANKER, House, StandIn

from trivec.api import scoring
from trivec.core.types import LongText, Output, Row
from trivec.models.scoring import WEIGHTS, fused_score
from trivec.settings import HttpLimits

QUERY = "what is a panda?"
DOCUMENTS = ["a bear", "hi", "a bear of China", "Paris"]


@pytest.fixture
def house() -> Iterator[House]:
    house = House(has_rerankers=True)
    yield house
    house.close()


async def ask(house: House, **given: object) -> Any:
    body = {"model": RERANKER, "query": QUERY, "documents": DOCUMENTS} | given
    async with house.client() as client:
        answer = await client.post("/rerank", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def logits(model: StandIn) -> list[float]:
    pairs = [(QUERY, document) for document in DOCUMENTS]
    sequences = await model.tokenize_pairs(pairs, long_text=LongText.REFUSE)
    scores = (await model.embed(sequences, Output.SCORE)).vectors.score
    return [float(score) for score in scores[:, 0]]


async def by_vectors(model: StandIn, weights: dict[Output, float]) -> list[float]:
    sequences = await model.tokenize([QUERY, *DOCUMENTS], long_text=LongText.REFUSE)
    vectors = (await model.embed(sequences, model.card.outputs)).vectors

    def row(i: int) -> dict[Output, Row]:
        return {output: cast("Row", vectors[output][i]) for output in weights}

    return [fused_score(row(0), row(i), weights) for i in range(1, len(sequences))]


def by_index(answer: Any) -> list[float]:
    scores = {one["index"]: one["relevance_score"] for one in answer["results"]}
    return [scores[i] for i in range(len(scores))]


async def test_a_reranker_answers_with_probabilities_the_best_first(house: House) -> None:
    answer = await ask(house)
    expected = [1 / (1 + np.exp(-logit)) for logit in await logits(house.reranker)]
    assert by_index(answer) == pytest.approx(expected)
    scores = [one["relevance_score"] for one in answer["results"]]
    assert scores == sorted(scores, reverse=True)
    best = answer["results"][0]
    assert best["document"] == {"text": DOCUMENTS[best["index"]]}
    assert answer["id"].startswith("rerank-")
    assert (answer["object"], answer["model"]) == ("list", RERANKER)


async def test_raw_scores_are_the_logits(house: House) -> None:
    answer = await ask(house, raw_scores=True)
    assert by_index(answer) == pytest.approx(await logits(house.reranker))


@pytest.mark.parametrize(
    ("given", "weights"),
    [
        pytest.param({}, WEIGHTS, id="the-papers-weights"),
        pytest.param({"weights": {"dense": 1}}, {Output.DENSE: 1.0}, id="dense"),
        pytest.param({"weights": {"sparse": 3}}, {Output.SPARSE: 1.0}, id="sparse"),
        pytest.param({"weights": {"colbert": 1}}, {Output.MULTI: 1.0}, id="multi"),
        pytest.param(
            {"weights": {"dense": 0.4, "sparse": 0.2, "multi": 0}},
            {Output.DENSE: 0.4, Output.SPARSE: 0.2},
            id="two-of-them",
        ),
    ],
)
async def test_three_vectors_rerank_by_their_weighted_mean_from_one_pass(
    house: House, given: dict[str, object], weights: dict[Output, float]
) -> None:
    answer = await ask(house, model=MODEL, **given)
    assert len(house.model.embedded) == 1
    assert by_index(answer) == pytest.approx(await by_vectors(house.model, dict(weights)), abs=1e-6)


async def test_any_model_reranks_by_cosine(house: House) -> None:
    answer = await ask(house, model=PLAIN_MODEL)
    expected = await by_vectors(house.plain_model, {Output.DENSE: 1.0})
    assert by_index(answer) == pytest.approx(expected, abs=1e-6)


async def test_token_vectors_are_scored_a_window_at_a_time(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once = await ask(house, model=MODEL)
    house.model.embedded.clear()
    monkeypatch.setattr(scoring, "WINDOW_BYTES", 20 * 4 * house.model.card.dimensions)
    in_windows = await ask(house, model=MODEL)
    assert in_windows["results"] == at_once["results"]
    windows = [sequences for sequences, _, _ in house.model.embedded]
    assert len(windows) > 1
    assert all(one.token_count <= 20 or len(one) == 1 for one in windows)


async def test_a_queue_that_fills_up_meanwhile_does_not_refuse_what_is_half_computed(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "WINDOW_BYTES", 20 * 4 * house.model.card.dimensions)
    house.model.gate.clear()
    asking = asyncio.create_task(ask(house, model=MODEL))
    assert await asyncio.to_thread(house.model.entered.wait, 60)
    house.model.room_tokens = 0
    house.model.gate.set()
    await asking
    tokens = sum(sequences.token_count for sequences, _, _ in house.model.embedded)

    answered = len(house.model.embedded)
    house.model.room_tokens = tokens - 1
    with pytest.raises(AssertionError, match="queue is full"):
        await ask(house, model=MODEL)
    assert len(house.model.embedded) == answered, "too large as a whole: nothing of it is computed"


@pytest.mark.parametrize("model", [RERANKER, MODEL, PLAIN_MODEL])
async def test_usage_is_what_was_computed_and_what_the_ledger_has(house: House, model: str) -> None:
    answer = await ask(house, model=model)
    (row,) = house.store.rows
    tokens = answer["usage"]["total_tokens"]
    used = {RERANKER: house.reranker, MODEL: house.model, PLAIN_MODEL: house.plain_model}[model]
    assert tokens == sum(sequences.token_count for sequences, _, _ in used.embedded)
    assert answer["usage"] == {
        "prompt_tokens": tokens,
        "total_tokens": tokens,
        "completion_tokens": 0,
    }
    assert (row.model, row.token_count, row.input_count) == (model, tokens, len(DOCUMENTS))


@pytest.mark.parametrize("field", ["top_n", "top_k"])
@pytest.mark.parametrize(("count", "returned"), [(1, 1), (3, 3), (9, 4), (0, 4)])
async def test_so_many_of_the_best_are_returned(
    house: House, field: str, count: int, returned: int
) -> None:
    whole = await ask(house)
    some = await ask(house, **{field: count})
    assert some["results"] == whole["results"][:returned]


async def test_a_count_may_be_said_in_both_words(house: House) -> None:
    both = await ask(house, top_n=2, top_k=2)
    assert both["results"] == (await ask(house, top_n=2, top_k=None))["results"]


async def test_documents_may_be_objects_and_may_be_left_out_of_the_answer(house: House) -> None:
    plain = await ask(house)
    objects = await ask(house, documents=[{"text": text} for text in DOCUMENTS])
    assert objects["results"] == plain["results"]
    bare = await ask(house, return_documents=False)
    assert all("document" not in one for one in bare["results"])


async def test_documents_of_one_score_stay_in_their_order(house: House) -> None:
    answer = await ask(house, documents=["same"] * 5)
    assert [one["index"] for one in answer["results"]] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("model", [RERANKER, MODEL])
async def test_a_long_document_is_cut_where_that_was_asked_for_and_said(
    house: House, model: str
) -> None:
    answer = await ask(house, model=model, documents=["a", "b" * 100], truncate="end")
    cut = {one["index"]: one.get("truncated") for one in answer["results"]}
    assert cut[0] is None
    assert cut[1]["kept_tokens"] == house.model.card.token_count_max
    assert cut[1]["original_tokens"] > 100


async def test_voyages_client_finds_the_results_where_it_looks(house: House) -> None:
    answer = await ask(house, truncation=True, return_documents=False, top_k=2)
    assert answer["data"] == answer["results"]
    assert "data" not in await ask(house)


async def test_a_server_of_voyages_form_has_the_results_in_data_alone(house: House) -> None:
    """`object`, `data`, `model`, `usage`, and a document as a string, where it is asked for."""
    house.limits = HttpLimits(rerank_answer="data")
    house.serve()
    answer = await ask(house, top_k=2, truncation=True)
    with_texts = await ask(house, return_documents=True)
    assert set(answer) == {"id", "object", "data", "model", "usage"}
    assert [set(one) for one in answer["data"]] == [{"index", "relevance_score"}] * 2
    assert answer["usage"]["total_tokens"] > 0
    texts = [DOCUMENTS[one["index"]] for one in with_texts["data"]]
    assert [one["document"] for one in with_texts["data"]] == texts


@pytest.mark.parametrize("model", [RERANKER, MODEL])
@pytest.mark.parametrize(
    ("given", "param"),
    [
        pytest.param({"query": ""}, "query", id="no-query"),
        pytest.param({"query": "q" * 70}, "query", id="query-too-long"),
        pytest.param({"query": "q" * 70, "truncate": True}, "query", id="and-it-is-never-cut"),
        pytest.param({"query": None}, "query", id="null-query"),
        pytest.param({"query": 1}, "query", id="query-of-another-type"),
        pytest.param({"documents": []}, "documents", id="no-documents"),
        pytest.param({"documents": ["a"] * 1001}, "documents", id="too-many-documents"),
        pytest.param({"documents": ["a", ""]}, "documents[1]", id="an-empty-document"),
        pytest.param({"documents": ["a", {"text": ""}]}, "documents[1]", id="an-empty-object"),
        pytest.param({"documents": [{"txt": "a"}]}, "documents[0].text", id="a-misspelt-object"),
        pytest.param({"documents": ["a", "b" * 99]}, "documents[1]", id="document-too-long"),
        pytest.param({"documents": "a"}, "documents", id="documents-of-another-type"),
        pytest.param({"documents": [1]}, "documents[0]", id="a-document-of-another-type"),
        pytest.param({"top_n": -1}, "top_n", id="a-negative-count"),
        pytest.param({"top_n": 1, "top_k": 2}, "top_k", id="two-counts"),
        pytest.param({"top_n": 0, "top_k": 2}, "top_k", id="all-of-them-and-two"),
        pytest.param({"weights": {"weight": 1}}, "weights", id="no-such-output"),
        pytest.param({"weights": {"dense": 0}}, "weights", id="no-weight"),
        pytest.param({"trunkate": True}, "trunkate", id="no-such-field"),
    ],
)
async def test_bad_input_is_refused_by_its_field_and_costs_nothing(
    house: House, model: str, given: dict[str, object], param: str
) -> None:
    body = {"model": model, "query": QUERY, "documents": DOCUMENTS} | given
    async with house.client() as client:
        answer = await client.post("/rerank", json=body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param
    assert "input[" not in error["message"]
    assert not house.store.rows
    assert statuses(house.store) == [400]


async def test_a_classifier_cannot_rank(house: House) -> None:
    body = {"model": CLASSIFIER, "query": QUERY, "documents": DOCUMENTS}
    async with house.client() as client:
        answer = await client.post("/rerank", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "model")
