"""Each face says what its own clients read, of the same vectors and scores."""

import base64
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tests.api.house import CLASSIFIER, MODEL, PLAIN_MODEL, RERANKER, House

from trivec.core.quantisation import quantise
from trivec.settings import HttpLimits

TEXTS = ["hello", "a bear of China", "hi"]
QUERY = "what is a panda?"
LONG = "b" * 100


@pytest.fixture(scope="module")
def house() -> Iterator[House]:
    house = House(has_rerankers=True)
    yield house
    house.close()


@pytest.fixture(params=["start", "end"])
def cutting(request: pytest.FixtureRequest) -> Iterator[House]:
    """A house that cuts texts where a request does not say."""
    house = House(limits=HttpLimits(truncate=request.param))
    yield house
    house.close()


async def ask(house: House, path: str, body: object, *, status: int = 200) -> Any:
    async with house.client() as client:
        answer = await client.post(f"http://house{path}", json=body)
    assert answer.status_code == status, answer.text
    return answer.json()


async def usual(house: House, texts: list[str], **given: object) -> Any:
    """What OpenAI's face says of *texts*."""
    body: dict[str, object] = {"model": MODEL, "input": texts}
    answer = await ask(house, "/v1/embeddings", body | given)
    return answer["data"]


async def vectors(house: House, texts: list[str], **given: object) -> list[list[float]]:
    return [one["embedding"] for one in await usual(house, texts, **given)]


async def ranked(house: House, documents: list[str], **given: object) -> dict[int, float]:
    body = {"model": RERANKER, "query": QUERY, "documents": documents} | given
    answer = await ask(house, "/v1/rerank", body)
    return {one["index"]: one["relevance_score"] for one in answer["results"]}


# --- Cohere ------------------------------------------------------------------------------------


async def test_cohere_embeds_in_every_type_at_once(house: House) -> None:
    types = ["float", "int8", "uint8", "binary", "ubinary", "base64"]
    body = {"model": MODEL, "texts": TEXTS, "input_type": "search_document"}
    answer = await ask(house, "/v2/embed", body | {"embedding_types": types})
    found, expected = answer["embeddings"], await vectors(house, TEXTS)
    assert list(found) == types
    assert found["float"] == expected
    rows = np.array(expected, np.float32)
    for dtype in ("int8", "uint8", "binary", "ubinary"):
        assert found[dtype] == quantise(rows, dtype).tolist()
    read = [np.frombuffer(base64.b64decode(one), "<f4") for one in found["base64"]]
    np.testing.assert_array_equal(read, rows)
    assert (answer["texts"], answer["response_type"]) == (TEXTS, "embeddings_by_type")


async def test_coheres_first_version_embeds_in_floats_or_by_type(house: House) -> None:
    body = {"model": MODEL, "texts": TEXTS}
    plain = await ask(house, "/v1/embed", body)
    typed = await ask(house, "/v1/embed", body | {"embedding_types": ["float"]})
    assert plain["embeddings"] == typed["embeddings"]["float"] == await vectors(house, TEXTS)
    assert plain["response_type"] == "embeddings_floats"


async def test_cohere_reads_inputs_in_parts_and_a_smaller_dimension(house: House) -> None:
    inputs = [{"content": [{"type": "text", "text": text}]} for text in TEXTS]
    body = {"model": PLAIN_MODEL, "inputs": inputs, "output_dimension": 4}
    answer = await ask(house, "/v2/embed", body)
    expected = await vectors(house, TEXTS, model=PLAIN_MODEL, dimensions=4)
    assert answer["embeddings"]["float"] == expected


async def test_cohere_cuts_by_default_and_says_so(house: House) -> None:
    body = {"model": MODEL, "texts": ["a", LONG]}
    answer = await ask(house, "/v2/embed", body)
    assert answer["embeddings"]["float"] == await vectors(house, ["a", LONG], truncate="end")
    assert answer["meta"]["warnings"] == ["texts[1] was cut to 64 tokens"]
    refused = await ask(house, "/v2/embed", body | {"truncate": "NONE"}, status=400)
    assert set(refused) == {"message", "id"}
    assert "texts[1]" in refused["message"]


async def test_cohere_names_its_own_field_for_too_many_tokens(house: House) -> None:
    body = {"model": MODEL, "texts": ["a"], "input_type": "search_query", "max_tokens": 10**6}
    refused = await ask(house, "/v2/embed", body, status=400)
    assert "'max_tokens' = 1000000" in refused["message"]


async def test_cohere_reranks_without_texts_and_counts_search_units(house: House) -> None:
    documents = [*TEXTS, LONG] * 30
    body = {"model": RERANKER, "query": QUERY, "documents": documents, "top_n": 5}
    answer = await ask(house, "/v2/rerank", body)
    expected = await ranked(house, documents, top_n=5, truncate="end")
    assert {one["index"]: one["relevance_score"] for one in answer["results"]} == expected
    assert all(set(one) == {"index", "relevance_score"} for one in answer["results"])
    assert answer["meta"]["billed_units"] == {"search_units": 2}
    assert answer["meta"]["warnings"][0] == "documents[3] was cut to 64 tokens"


@pytest.mark.parametrize("model", [RERANKER, MODEL])
async def test_cohere_cuts_documents_to_the_tokens_asked_for(house: House, model: str) -> None:
    body = {"model": model, "query": "q", "documents": ["abcdefgh"], "max_tokens_per_doc": 5}
    cut = await ask(house, "/v2/rerank", body)
    short = await ask(house, "/v2/rerank", body | {"documents": ["abc"]})
    assert cut["results"] == short["results"]
    assert len(cut["meta"]["warnings"]) == 1


# --- TEI ---------------------------------------------------------------------------------------


async def test_tei_embeds_by_the_first_model_that_can(house: House) -> None:
    expected = await vectors(house, TEXTS)
    assert await ask(house, "/embed", {"inputs": TEXTS}) == expected
    assert await ask(house, "/", {"inputs": TEXTS[0]}) == expected[:1]
    by_name = await ask(house, "/embed", {"inputs": TEXTS, "model": PLAIN_MODEL, "dimensions": 4})
    assert by_name == await vectors(house, TEXTS, model=PLAIN_MODEL, dimensions=4)
    ids = [12, 13]
    assert await ask(house, "/embed", {"inputs": [ids]}) == await vectors(house, [ids])  # type: ignore[list-item]
    assert await ask(house, "/embed", {"inputs": ids}) == await vectors(house, [ids])  # type: ignore[list-item]


async def test_tei_embeds_sparsely_and_by_token(house: House) -> None:
    [both] = await usual(house, TEXTS[:1], output_type="sparse&multi")
    sparse = both["sparse_embedding"]
    [found] = await ask(house, "/embed_sparse", {"inputs": TEXTS[0]})
    assert [one["index"] for one in found] == sparse["indices"]
    assert [one["value"] for one in found] == sparse["values"]
    [rows] = await ask(house, "/embed_all", {"inputs": TEXTS[:1]})
    assert rows == both["multi_embedding"]["data"]
    refused = await ask(house, "/embed_all", {"inputs": "a", "model": PLAIN_MODEL}, status=422)
    assert refused["error_type"] == "Validation"


async def test_tei_reranks_with_its_own_keys_or_vllms(house: House) -> None:
    expected = await ranked(house, TEXTS)
    answer = await ask(house, "/rerank", {"query": QUERY, "texts": TEXTS, "return_text": True})
    assert {one["index"]: one["score"] for one in answer} == expected
    assert [one["text"] for one in answer] == [TEXTS[one["index"]] for one in answer]
    assert answer == sorted(answer, key=lambda one: -one["score"])
    bare = await ask(house, "/", {"query": QUERY, "texts": TEXTS, "raw_scores": True})
    raw = await ranked(house, TEXTS, raw_scores=True)
    assert {one["index"]: one["score"] for one in bare} == raw
    assert all(set(one) == {"index", "score"} for one in bare)
    body = {"model": RERANKER, "query": QUERY, "documents": TEXTS}
    assert (await ask(house, "/rerank", body))["results"][0]["document"]["text"] in TEXTS


async def test_tei_predicts_classes_of_texts_and_pairs(house: House) -> None:
    one = await ask(house, "/predict", {"inputs": "hello", "model": CLASSIFIER})
    assert [set(row) for row in one] == [{"score", "label"}] * 3
    assert sum(row["score"] for row in one) == pytest.approx(1)
    assert one == sorted(one, key=lambda row: -row["score"])
    assert {row["label"] for row in one} == {"LABEL_0", "LABEL_1", "LABEL_2"}
    assert await ask(house, "/predict", {"inputs": [["hello"]], "model": CLASSIFIER}) == [one]
    pairs = await ask(house, "/predict", {"inputs": [[QUERY, text] for text in TEXTS]})
    assert [row[0]["score"] for row in pairs] == list(
        dict(sorted((await ranked(house, TEXTS)).items())).values()
    )
    pair = await ask(house, "/predict", {"inputs": [QUERY, TEXTS[0]]})
    assert pair == pairs[0]
    mixed = {"inputs": [["a"], ["a", "b"]], "model": CLASSIFIER}
    assert "inputs[1]" in (await ask(house, "/predict", mixed, status=422))["error"]


async def test_tei_compares_by_cosine(house: House) -> None:
    inputs = {"source_sentence": QUERY, "sentences": TEXTS}
    expected = await ranked(house, TEXTS, model=MODEL, weights={"dense": 1})
    for path in ("/similarity", "/"):
        found = await ask(house, path, {"inputs": inputs})
        assert found == [expected[i] for i in range(len(TEXTS))]


async def test_tei_cuts_only_where_it_is_told_to_and_at_the_side_it_is_told(house: House) -> None:
    refused = await ask(house, "/embed", {"inputs": ["a", LONG]}, status=422)
    assert set(refused) == {"error", "error_type"}
    assert "inputs[1]" in refused["error"]
    text = "a" * 50 + "b" * 50
    for direction, side in (("Right", "end"), ("Left", "start")):
        body = {"inputs": text, "truncate": True, "truncation_direction": direction}
        assert await ask(house, "/embed", body) == await vectors(house, [text], truncate=side)


async def test_tei_cuts_at_the_side_it_is_told_where_the_server_cuts_by_itself(
    cutting: House,
) -> None:
    text = "a" * 50 + "b" * 50
    for direction, side in (("Right", "end"), ("Left", "start")):
        body = {"inputs": text, "truncation_direction": direction}
        assert await ask(cutting, "/embed", body) == await vectors(cutting, [text], truncate=side)


async def test_tei_tokenizes_and_decodes_for_nothing(house: House) -> None:
    before = len(house.store.rows)
    [found] = await ask(house, "/tokenize", {"inputs": "hi", "add_special_tokens": False})
    assert found[1] == {"id": 109, "text": "i", "special": False, "start": 1, "stop": 2}
    [whole] = await ask(house, "/tokenize", {"inputs": ["hi"]})
    assert [token["special"] for token in whole] == [True, False, False, True]
    ids = [token["id"] for token in whole]
    assert await ask(house, "/decode", {"ids": ids}) == ["hi"]
    assert await ask(house, "/decode", {"ids": [ids], "skip_special_tokens": False}) == ["‹0›hi‹2›"]
    assert len(house.store.rows) == before


async def test_tei_tells_of_the_model_that_answers(house: House) -> None:
    async with house.client() as client:
        info = (await client.get("http://house/info")).json()
    assert (info["model_id"], info["max_input_length"]) == (MODEL, 64)
    assert (info["model_type"], info["auto_truncate"]) == ({"embedding": {}}, False)


# --- vLLM --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second"),
    [("queries", "documents"), ("queries", "items"), ("text_1", "text_2"), ("data_1", "data_2")],
)
async def test_vllm_scores_one_text_with_many_or_each_with_its_own(
    house: House, first: str, second: str
) -> None:
    expected = await ranked(house, TEXTS)
    for model in (RERANKER, None):
        answer = await ask(house, "/v1/score", {"model": model, first: QUERY, second: TEXTS})
        assert [one["score"] for one in answer["data"]] == [expected[i] for i in range(3)]
    pairs = await ask(house, "/score", {first: [QUERY] * 3, second: TEXTS})
    assert pairs["data"] == answer["data"]
    assert answer["data"][1]["object"] == "score"
    raw = await ask(house, "/score", {first: QUERY, second: TEXTS[0], "use_activation": False})
    assert raw["data"][0]["score"] == (await ranked(house, TEXTS, raw_scores=True))[0]


async def test_vllm_scores_pairs_of_vectors_each_with_its_own(house: House) -> None:
    queries = ["a", "bb", "ccc"]
    answer = await ask(house, "/score", {"model": MODEL, "text_1": queries, "text_2": TEXTS})
    for i, one in enumerate(answer["data"]):
        alone = await ask(
            house, "/score", {"model": MODEL, "text_1": queries[i], "text_2": TEXTS[i]}
        )
        assert one["score"] == alone["data"][0]["score"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        pytest.param({"text_1": "a"}, "queries", id="half-a-pair"),
        pytest.param(
            {"text_1": "a", "text_2": "b", "items": ["c"]}, "items", id="a-pair-and-half-another"
        ),
        pytest.param(
            {"text_1": ["a", "b"], "text_2": ["a", "b", "c"]}, "text_1", id="two-of-three"
        ),
        pytest.param({"text_1": "a", "text_2": LONG}, "text_2[0]", id="too-long"),
        pytest.param({"text_1": LONG, "text_2": "a"}, "text_1", id="too-long-a-query"),
    ],
)
async def test_vllm_refuses_by_the_field(house: House, body: dict[str, Any], param: str) -> None:
    refused = await ask(house, "/score", body, status=400)
    assert refused["error"]["param"] == param
    assert "input" not in refused["error"]["message"].replace("that input", "")


async def test_vllm_cuts_where_it_is_told_to(house: House) -> None:
    body = {"text_1": "a", "text_2": LONG, "truncate_prompt_tokens": -1}
    assert (await ask(house, "/score", body))["usage"]["prompt_tokens"] == 64


# --- Ollama ------------------------------------------------------------------------------------


async def test_ollama_embeds_under_a_models_name_with_its_tag_or_without(house: House) -> None:
    expected = await vectors(house, TEXTS)
    for name in (MODEL, f"{MODEL}:latest"):
        answer = await ask(house, "/api/embed", {"model": name, "input": TEXTS})
        assert (answer["embeddings"], answer["model"]) == (expected, name)
    assert answer["prompt_eval_count"] == sum(len(text) + 2 for text in TEXTS)
    one = await ask(house, "/api/embeddings", {"model": MODEL, "prompt": TEXTS[0]})
    assert one == {"embedding": expected[0]}
    small = {"model": PLAIN_MODEL, "input": TEXTS[0], "dimensions": 4}
    [row] = (await ask(house, "/api/embed", small))["embeddings"]
    assert row == (await vectors(house, TEXTS, model=PLAIN_MODEL, dimensions=4))[0]


async def test_ollama_cuts_unless_it_is_told_not_to(house: House) -> None:
    answer = await ask(house, "/api/embed", {"model": MODEL, "input": LONG})
    assert answer["embeddings"] == await vectors(house, [LONG], truncate="end")
    body = {"model": MODEL, "input": LONG, "truncate": False}
    assert set(await ask(house, "/api/embed", body, status=400)) == {"error"}


async def test_ollama_lists_and_shows_what_the_key_may_use(house: House) -> None:
    async with house.client() as client:
        tags = (await client.get("http://house/api/tags")).json()["models"]
        version = (await client.get("http://house/api/version")).json()["version"]
        probe = await client.head("http://house/")
    assert [one["name"] for one in tags] == [MODEL, PLAIN_MODEL, RERANKER, CLASSIFIER]
    assert (version.count("."), probe.status_code) == (2, 200)
    shown = await ask(house, "/api/show", {"name": f"{MODEL}:latest"})
    assert shown["capabilities"] == ["embedding"]
    assert shown["model_info"]["trivec.context_length"] == 64
    assert set(await ask(house, "/api/show", {"model": "nope"}, status=404)) == {"error"}


# --- prompts -----------------------------------------------------------------------------------


@pytest.fixture
def with_prompts() -> Iterator[House]:
    house = House()
    prompts = {"query": "query: ", "document": "passage: "}
    house.model.card = replace(house.model.card, prompts=prompts)
    yield house
    house.close()


async def test_a_query_and_its_documents_are_compared_behind_their_prompts(
    with_prompts: House,
) -> None:
    body = {"model": MODEL, "query": "a", "documents": ["b", "c"], "weights": {"dense": 1}}
    answer = await ask(with_prompts, "/v1/rerank", body)
    query = np.array(await vectors(with_prompts, ["query: a"], prompt=""))[0]
    documents = np.array(await vectors(with_prompts, ["passage: b", "passage: c"], prompt=""))
    found = {one["index"]: one["relevance_score"] for one in answer["results"]}
    assert [found[0], found[1]] == pytest.approx((documents @ query).tolist(), abs=1e-6)


async def test_faces_put_the_models_prompts_before_texts(with_prompts: House) -> None:
    [expected] = await vectors(with_prompts, ["query: a"], prompt="")
    by_cohere = {"model": MODEL, "texts": ["a"], "input_type": "search_query"}
    assert (await ask(with_prompts, "/v2/embed", by_cohere))["embeddings"]["float"] == [expected]
    by_tei = {"inputs": "a", "prompt_name": "query"}
    assert await ask(with_prompts, "/embed", by_tei) == [expected]
    assert len((await ask(with_prompts, "/tokenize", by_tei))[0]) == len("query: a") + 2
    inputs = {"source_sentence": "a", "sentences": ["a"]}
    same = {"inputs": inputs, "parameters": {"prompt_name": "query"}}
    assert await ask(with_prompts, "/similarity", same) == pytest.approx([1.0])
    refused = await ask(with_prompts, "/embed", by_tei | {"prompt_name": "nope"}, status=422)
    assert "query" in refused["error"]
