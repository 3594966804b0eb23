"""Late chunking: parts of what is read as one have vectors of their own."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from tests.api.house import CARD, MODEL, House, StandIn

from trivec.core.types import Output


@pytest.fixture
def chunking() -> Iterator[House]:
    """A house whose model pools the mean; in it a character is a token, and 64 are read."""
    house = House(model=StandIn(replace(CARD, late_chunking=True, prompts={"query": "q: "})))
    yield house
    house.close()


async def post(house: House, **given: object) -> dict[str, Any]:
    async with house.client() as client:
        answer: dict[str, Any] = (
            await client.post("/embeddings", json={"model": MODEL, **given})
        ).json()
    return answer


async def test_texts_read_as_one_have_a_vector_each(chunking: House) -> None:
    answer = await post(chunking, input=["first ", "second ", "third"], late_chunking=True)
    assert [item["index"] for item in answer["data"]] == [0, 1, 2]
    assert [len(item["embedding"]) for item in answer["data"]] == [8, 8, 8]
    assert len({str(item["embedding"]) for item in answer["data"]}) == 3
    assert "chunk" not in answer["data"][0]
    assert answer["usage"]["prompt_tokens"] == len("first second third") + 2
    assert [row.token_count for row in chunking.store.rows] == [20]
    (sequences, outputs, _), *more = chunking.model.embedded
    assert (len(sequences), outputs, more) == (1, Output.CHUNKS, [])


async def test_a_text_is_cut_after_it_is_read_and_each_part_says_where_it_was(
    chunking: House,
) -> None:
    answer = await post(chunking, input=["abcdefg", "hi"], chunk_size=3)
    assert [item["index"] for item in answer["data"]] == [0, 1, 2, 3]
    assert [item["chunk"] for item in answer["data"]] == [
        {"input": 0, "tokens": [1, 4], "characters": [0, 3]},
        {"input": 0, "tokens": [4, 7], "characters": [3, 6]},
        {"input": 0, "tokens": [7, 8], "characters": [6, 7]},
        {"input": 1, "tokens": [1, 3], "characters": [0, 2]},
    ]
    assert answer["usage"]["prompt_tokens"] == 9 + 4


async def test_a_prompt_is_read_with_the_text_and_in_no_part(chunking: House) -> None:
    answer = await post(chunking, input="abcd", chunk_size=2, input_type="query")
    assert [item["chunk"] for item in answer["data"]] == [
        {"input": 0, "tokens": [4, 6], "characters": [0, 2]},
        {"input": 0, "tokens": [6, 8], "characters": [2, 4]},
    ]
    late = await post(chunking, input=["ab", "cd"], late_chunking=True, input_type="query")
    assert late["usage"]["prompt_tokens"] == len("q: abcd") + 2


async def test_sizes_and_types_hold_for_parts(chunking: House) -> None:
    asked: dict[str, object] = {"input": ["ab", "cd"], "late_chunking": True}
    answer = await post(chunking, **asked, output_dtype="ubinary", encoding_format="base64")
    assert [len(item["embedding"]) for item in answer["data"]] == [4, 4]  # a byte, in base64


async def test_truncate_wins_over_truncation_with_chunks_too(chunking: House) -> None:
    """As everywhere: a client that sets Voyage's word by default may still ask for whole texts."""
    asked: dict[str, object] = {"input": ["ab", "cd"], "late_chunking": True}
    plain = await post(chunking, **asked)
    assert await post(chunking, **asked, truncate=False, truncation=True) == plain


@pytest.mark.parametrize("off", [False, None])
async def test_what_is_not_asked_for_changes_nothing(house: House, off: object) -> None:
    plain = await post(house, input=["a", "b"])
    assert await post(house, input=["a", "b"], late_chunking=off, chunk_size=None) == plain


async def test_no_cut_wins_over_voyages_word_for_it(chunking: House) -> None:
    asked: dict[str, object] = {"input": ["ab", "cd"], "late_chunking": True, "truncation": True}
    assert len((await post(chunking, **asked, truncate=False))["data"]) == 2


async def test_models_say_whether_they_can(chunking: House) -> None:
    async with chunking.client() as client:
        listed = (await client.get("/models")).json()["data"]
    assert [model["late_chunking"] for model in listed] == [True, False]


async def test_texts_that_do_not_fit_together_are_refused(chunking: House) -> None:
    answer = await post(chunking, input=["x" * 40, "y" * 40], late_chunking=True)
    assert answer["error"]["type"] == "invalid_request_error"
    assert not chunking.model.embedded


@pytest.mark.parametrize(
    ("given", "param", "message"),
    [
        pytest.param(
            {"late_chunking": True, "model": "all-minilm-l6-v2"}, "late_chunking",
            "needs a model whose vector is the mean", id="another-pooling",
        ),
        pytest.param(
            {"late_chunking": True, "chunk_size": 3}, "late_chunking", "send one of them",
            id="both",
        ),
        pytest.param(
            {"chunk_size": 3, "output_type": "dense&sparse"}, "chunk_size", "dense vectors alone",
            id="other-outputs",
        ),
        pytest.param({"chunk_size": 3, "input": [5, 6]}, "chunk_size", "token ids", id="ids"),
        pytest.param(
            {"late_chunking": True, "truncate": "start"}, "late_chunking", "none can be cut",
            id="cutting",
        ),
        pytest.param(
            {"chunk_size": 3, "truncation": True}, "chunk_size", "none can be cut",
            id="cutting-in-voyages-word",
        ),
        pytest.param({"chunk_size": 0}, "chunk_size", "Invalid value", id="chunks-of-nothing"),
    ],
)  # fmt: skip
async def test_what_does_not_go_with_it_is_refused(
    chunking: House, given: dict[str, object], param: str, message: str
) -> None:
    error = (await post(chunking, **{"input": "abc", **given}))["error"]
    assert error["param"] == param
    assert message in error["message"]
    assert not chunking.model.embedded
