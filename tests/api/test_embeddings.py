"""What goes in and what comes out of `POST /embeddings`, in every form and encoding."""

import base64
import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest
from tests.api.house import ALIAS, MODEL, PLAIN_CARD, PLAIN_MODEL, RERANKER, House, StandIn

from trivec.accounts import KeyPlan
from trivec.api.app import PREFIXES
from trivec.api.schemas import EmbeddingsResponse
from trivec.core.types import Float32Array, Output, Sequences, Truncated
from trivec.settings import HttpLimits

FORMS = {
    "a text": ("hello", ["hello"]),
    "texts": (["hello", " ", "\u0000é😀"], ["hello", " ", "\u0000é😀"]),
    "token ids of one text": ([5, 6, 7], [[5, 6, 7]]),
    "lists of token ids": ([[5, 6], [7]], [[5, 6], [7]]),
}
WORDS = ("dense", "sparse", "multi")


async def embed(house: House, **given: object) -> httpx.Response:
    async with house.client() as client:
        return await client.post("/embeddings", json={"model": MODEL, "input": "hello", **given})


async def vectors(house: House, **given: object) -> dict[str, Any]:
    response = await embed(house, **given)
    assert response.status_code == 200, response.text
    msgspec.json.decode(response.content, type=EmbeddingsResponse)  # the hand-written bytes fit
    answer: dict[str, Any] = response.json()
    return answer


def floats(given: "str | Sequence[float]") -> Float32Array:
    if isinstance(given, str):
        return np.frombuffer(base64.b64decode(given, validate=True), "<f4")
    return np.array(given, np.float64).astype(np.float32)


@pytest.mark.parametrize(("given", "items"), FORMS.values(), ids=FORMS)
async def test_every_form_of_input_gives_one_vector_an_item_in_order(
    house: House, given: object, items: list[Any]
) -> None:
    together = await vectors(house, input=given)
    assert [datum["index"] for datum in together["data"]] == list(range(len(items)))
    for datum, item in zip(together["data"], items, strict=True):
        alone = await vectors(house, input=[item])
        assert datum["embedding"] == alone["data"][0]["embedding"]
        assert datum["object"] == "embedding"


async def test_token_ids_that_already_have_their_ends_are_left_as_they_are(house: House) -> None:
    bare = await vectors(house, input=[5, 6])
    whole = await vectors(house, input=[0, 5, 6, 2])
    assert bare["data"] == whole["data"]
    assert bare["usage"] == whole["usage"] == {"prompt_tokens": 4, "total_tokens": 4}


@pytest.mark.parametrize("prefix", PREFIXES)
async def test_every_prefix_is_the_same_route(house: House, prefix: str) -> None:
    async with house.client() as client:
        body = {"model": MODEL, "input": "hello"}
        response = await client.post(f"http://house{prefix}/embeddings", json=body)
    assert response.json() == await vectors(house)


async def test_an_alias_is_echoed_as_it_was_asked_for_and_billed_by_its_id(house: House) -> None:
    answer = await vectors(house, model=ALIAS)
    assert answer["model"] == ALIAS
    assert house.store.rows[-1].model == MODEL


@pytest.mark.parametrize("words", [w for n in (1, 2, 3) for w in itertools.combinations(WORDS, n)])
async def test_base64_and_floats_are_the_same_bits_for_every_output(
    house: House, words: tuple[str, ...]
) -> None:
    asked = {"input": ["hello", "a"], "output_type": "&".join(words)}
    plain = await vectors(house, **asked)
    packed = await vectors(house, **asked, encoding_format="base64")
    for one, other in zip(plain["data"], packed["data"], strict=True):
        assert isinstance(other["embedding"], str)
        np.testing.assert_array_equal(floats(one["embedding"]), floats(other["embedding"]))
        assert len(floats(one["embedding"])) == (8 if "dense" in words else 0)
        assert ("sparse_embedding" in one) == ("sparse" in words)
        assert ("multi_embedding" in one) == ("multi" in words)
        if "sparse" in words:
            sparse, packed_sparse = one["sparse_embedding"], other["sparse_embedding"]
            indices = np.frombuffer(base64.b64decode(packed_sparse["indices"]), "<i4")
            assert sparse["indices"] == indices.tolist()
            np.testing.assert_array_equal(floats(sparse["values"]), floats(packed_sparse["values"]))
            assert "tokens" not in sparse
            assert ("encoding" not in sparse, packed_sparse["encoding"]) == (True, "base64")
        if "multi" in words:
            multi, packed_multi = one["multi_embedding"], other["multi_embedding"]
            assert multi["shape"] == packed_multi["shape"]
            assert ("encoding" not in multi, packed_multi["encoding"]) == (True, "base64")
            found = floats(multi["data"])
            assert list(found.shape) == multi["shape"]
            np.testing.assert_array_equal(found.ravel(), floats(packed_multi["data"]))


async def test_the_usual_answer_has_openais_keys_and_no_others(house: House) -> None:
    answer = await vectors(house)
    assert list(answer) == ["object", "model", "data", "usage"]
    assert list(answer["data"][0]) == ["object", "index", "embedding"]


@pytest.mark.parametrize(
    ("word", "empty"), [("float", []), ("base64", "")], ids=["float", "base64"]
)
async def test_a_dense_vector_that_was_not_asked_for_is_empty_and_never_null(
    house: House, word: str, empty: object
) -> None:
    answer = await vectors(house, output_type="sparse", encoding_format=word)
    assert answer["data"][0]["embedding"] == empty


@pytest.mark.parametrize(
    ("words", "outputs"),
    [
        pytest.param(None, Output.DENSE, id="unset-is-dense"),
        pytest.param("multi", Output.MULTI, id="one-word"),
        pytest.param("colbert", Output.MULTI, id="colbert-is-multi"),
        pytest.param("sparse&dense", Output.DENSE | Output.SPARSE, id="joined"),
        pytest.param(["dense", "multi"], Output.DENSE | Output.MULTI, id="a-list"),
        pytest.param(["dense&sparse", "colbert"], Output(7), id="a-list-of-joined-words"),
        pytest.param("dense&dense", Output.DENSE, id="twice-is-once"),
    ],
)
async def test_the_model_computes_exactly_what_was_asked_for(
    house: House, words: object, outputs: Output
) -> None:
    await vectors(house, output_type=words)
    assert [asked for _, asked, _ in house.model.embedded] == [outputs]


async def test_sparse_ids_can_be_spelled(house: House) -> None:
    answer = await vectors(house, output_type="sparse", return_tokens=True)
    sparse = answer["data"][0]["sparse_embedding"]
    assert sparse["tokens"] == [f"‹{index}›" for index in sparse["indices"]]


async def test_a_cut_text_is_reported_and_others_are_not(house: House) -> None:
    answer = await vectors(house, input=["short", "x" * 100], truncate=True)
    first, second = answer["data"]
    assert "truncated" not in first
    assert second["truncated"] == {"original_tokens": 102, "kept_tokens": 64}
    assert answer["usage"]["prompt_tokens"] == 7 + 64


@pytest.mark.parametrize(
    ("word", "kept"),
    [
        pytest.param(True, "x" * 62, id="true-keeps-the-start"),
        pytest.param("end", "x" * 62, id="end-keeps-the-start"),
        pytest.param("start", "y" * 62, id="start-keeps-the-end"),
    ],
)
async def test_which_end_is_cut(house: House, word: object, kept: str) -> None:
    cut = await vectors(house, input="x" * 62 + "y" * 62, truncate=word)
    whole = await vectors(house, input=kept)
    assert cut["data"][0]["embedding"] == whole["data"][0]["embedding"]


@pytest.mark.parametrize(
    ("asked", "kept"),
    [
        pytest.param({"truncate": "END"}, "x" * 62, id="capitals"),
        pytest.param({"truncate": "START"}, "y" * 62, id="capitals-start"),
        pytest.param({"truncation": True}, "x" * 62, id="voyages-word"),
        pytest.param({"truncation": False, "truncate": "end"}, "x" * 62, id="our-word-wins"),
        pytest.param({"truncate_prompt_tokens": 12}, "x" * 10, id="so-many-tokens"),
        pytest.param(
            {"truncate_prompt_tokens": 12, "truncate": "start"}, "y" * 10, id="the-last-so-many"
        ),
        pytest.param({"truncate_prompt_tokens": -1}, "x" * 62, id="as-many-as-the-model-reads"),
        pytest.param({"truncate_prompt_tokens": 64}, "x" * 62, id="the-models-own-number"),
    ],
)
async def test_every_word_for_cutting(house: House, asked: dict[str, object], kept: str) -> None:
    cut = await vectors(house, input="x" * 62 + "y" * 62, **asked)
    whole = await vectors(house, input=kept)
    assert cut["data"][0]["embedding"] == whole["data"][0]["embedding"]
    assert cut["data"][0]["truncated"] == {"original_tokens": 126, "kept_tokens": len(kept) + 2}
    assert cut["usage"] == whole["usage"]


@pytest.mark.parametrize("asked", [{"truncate": "NONE"}, {"truncation": False}])
async def test_words_for_not_cutting(house: House, asked: dict[str, object]) -> None:
    response = await embed(house, input="x" * 100, **asked)
    assert response.json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize("count", [0, 65, -2, 1.5, "9"])
async def test_a_number_of_tokens_that_cannot_be_is_refused(house: House, count: object) -> None:
    response = await embed(house, truncate_prompt_tokens=count)
    assert (response.status_code, response.json()["error"]["param"]) == (
        400,
        "truncate_prompt_tokens",
    )


@pytest.mark.parametrize("word", [None, False, "none"])
async def test_a_long_text_is_an_error_unless_it_may_be_cut(house: House, word: object) -> None:
    response = await embed(house, input="x" * 100, truncate=word)
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    ("server", "key", "request_says", "kept"),
    [
        pytest.param("none", None, None, None, id="nobody-cuts"),
        pytest.param("end", None, None, "x", id="the-server-cuts"),
        pytest.param("end", "start", None, "y", id="a-key-has-the-better-of-the-server"),
        pytest.param("end", "none", None, None, id="a-key-may-forbid-it"),
        pytest.param("none", "start", "end", "x", id="a-request-has-the-better-of-both"),
        pytest.param("end", "end", False, None, id="a-request-may-forbid-it"),
    ],
)
def test_whose_word_decides_what_becomes_of_a_long_text(
    server: str, key: str | None, request_says: object, kept: str | None
) -> None:
    house = House(limits=HttpLimits.model_validate({"truncate": server}))
    access = {"authorization": f"Bearer {house.new_key('team', truncate=key)}"}
    body = {"model": MODEL, "input": "x" * 62 + "y" * 62, "truncate": request_says}
    with (
        house.listening() as address,
        httpx.Client(base_url=f"{address}/v1", headers=access, timeout=60) as client,
    ):
        answer = client.post("/embeddings", json=body).json()
        whole = client.post(
            "/embeddings", json={"model": MODEL, "input": (kept or "x") * 62}
        ).json()
        shown = client.get(f"/models/{MODEL}").json()
    house.close()
    assert shown["truncate"] == (key or server)
    if kept is None:
        assert answer["error"]["code"] == "context_length_exceeded"
        return
    assert answer["data"][0]["embedding"] == whole["data"][0]["embedding"]
    assert answer["data"][0]["truncated"] == {"original_tokens": 126, "kept_tokens": 64}


async def test_a_leading_slice_is_a_vector_of_length_one(house: House) -> None:
    whole = await vectors(house, model=PLAIN_MODEL)
    sliced = await vectors(house, model=PLAIN_MODEL, dimensions=3)
    expected = floats(whole["data"][0]["embedding"])[:3]
    found = floats(sliced["data"][0]["embedding"])
    assert math.isclose(np.linalg.norm(found), 1.0, rel_tol=1e-6)
    np.testing.assert_allclose(found, expected / np.linalg.norm(expected), rtol=1e-6)


@pytest.mark.parametrize(
    "field",
    [
        "encoding_format",
        "dimensions",
        "user",
        "output_type",
        "truncate",
        "return_tokens",
        "token_encoding",
        "input_type",
        "prompt_name",
        "prompt",
        "output_dimension",
        "output_dtype",
        "truncation",
        "truncate_prompt_tokens",
        "some_field_of_another_server",
    ],
)
async def test_null_is_unset(house: House, field: str) -> None:
    assert await vectors(house, **{field: None}) == await vectors(house)


@pytest.mark.parametrize("given", [form for form, _ in FORMS.values()], ids=FORMS)
async def test_usage_is_what_tokenize_counts_and_what_the_ledger_bills(
    house: House, given: object
) -> None:
    answer = await vectors(house, input=given)
    async with house.client() as client:
        counted = await client.post("/tokenize", json={"model": MODEL, "input": given})
    tokens = answer["usage"]["prompt_tokens"]
    assert tokens == answer["usage"]["total_tokens"] == counted.json()["total_tokens"]
    assert [row.token_count for row in house.store.rows] == [tokens]
    assert list(house.store.counts.values()) == [1]


async def test_a_large_answer_is_the_same_out_of_line(house: House) -> None:
    texts = [f"text {i}" for i in range(2048)]
    answer = await vectors(house, input=texts)
    alone = await vectors(house, input=texts[-1])
    assert len(answer["data"]) == 2048
    assert answer["data"][-1]["embedding"] == alone["data"][0]["embedding"]


async def test_tokenize_says_what_would_fit(house: House) -> None:
    async with house.client() as client:
        body = {"model": MODEL, "input": ["ab", "x" * 100], "return_tokens": True}
        answer = (await client.post("/tokenize", json=body)).json()
    short, long = answer["data"]
    assert short == {
        "object": "tokens",
        "index": 0,
        "token_ids": [0, 101, 102, 2],
        "token_count": 4,
        "fits": True,
        "tokens": ["‹0›", "‹101›", "‹102›", "‹2›"],
    }
    assert (long["token_count"], long["fits"]) == (102, False)
    assert (answer["token_count_max"], answer["total_tokens"], answer["fits"]) == (64, 106, False)


async def test_a_text_over_the_bound_of_bytes_does_not_fit(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def one_token_of_many_bytes(*_: object, **__: object) -> Sequences:
        return Sequences.pack([[0, 3, 2]], {0: Truncated(3, 3)})

    monkeypatch.setattr(house.model, "tokenize", one_token_of_many_bytes)
    async with house.client() as client:
        answer = (await client.post("/tokenize", json={"model": MODEL, "input": "x"})).json()
    assert (answer["data"][0]["token_count"], answer["data"][0]["fits"]) == (3, False)
    assert answer["fits"] is False


async def test_models_are_listed_in_openais_words_and_ours(house: House) -> None:
    async with house.client() as client:
        listed = (await client.get("/models")).json()
        shown = (await client.get(f"/models/{MODEL}")).json()
        quoted = (await client.get(f"/models/{MODEL.replace('/', '%2F')}")).json()
        alias = (await client.get(f"/models/{ALIAS}")).json()
    assert [model["id"] for model in listed["data"]] == [MODEL, PLAIN_MODEL]
    assert listed["data"][0] == shown == quoted
    assert alias == shown | {"id": ALIAS}
    assert shown["object"] == "model"
    assert shown["context_size"] == 64
    assert shown["output_types"] == ["dense", "sparse", "multi"]
    assert {"created", "owned_by", "dimensions", "precision", "recipe"} <= set(shown)


async def test_a_key_sees_only_its_own_models(house: House) -> None:
    key = (await house.accounts.create_key(KeyPlan("one", models=frozenset({PLAIN_MODEL})))).plain
    async with house.client(key) as client:
        listed = (await client.get("/models")).json()
        denied = await client.get(f"/models/{MODEL}")
        unknown = await client.get("/models/nope")
    assert [model["id"] for model in listed["data"]] == [PLAIN_MODEL]
    assert denied.status_code == 403
    assert MODEL not in unknown.json()["error"]["message"]


@pytest.fixture(params=[Output.SPARSE, Output.MULTI], ids=["splade", "token-vectors"])
def other_house(request: pytest.FixtureRequest) -> House:
    """Its plain model has no dense vectors."""
    return House(
        plain_model=StandIn(replace(PLAIN_CARD, outputs=request.param)), has_rerankers=True
    )


async def test_a_model_without_dense_vectors_answers_with_what_it_has(other_house: House) -> None:
    output = other_house.plain_model.card.main_output
    (datum,) = (await vectors(other_house, model=PLAIN_MODEL))["data"]
    assert datum[f"{str(output.name).lower()}_embedding"]
    assert datum["embedding"] == []


async def test_a_reranker_has_no_vectors_and_says_so(other_house: House) -> None:
    response = await embed(other_house, model=RERANKER)
    assert response.status_code == 400
    assert "has no dense output; it has score" in response.text
