"""What is put before each text: by name, by the kind of text, literally, or by the model's default."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from tests.api.house import CARD, MODEL, PLAIN_MODEL, House, StandIn

from trivec.core.types import ModelCard
from trivec.settings import HttpLimits

PROMPTS = {"query": "q: ", "passage": "p: ", "Clustering": "c: ", "document": ""}


def house_of(card: ModelCard, **limits: object) -> House:
    return House(model=StandIn(card), limits=HttpLimits.model_validate(limits))


@pytest.fixture
def prompted() -> Iterator[House]:
    house = house_of(replace(CARD, prompts=PROMPTS))
    yield house
    house.close()


@pytest.fixture
def with_default() -> Iterator[House]:
    house = house_of(replace(CARD, prompts=PROMPTS, default_prompt_name="query"))
    yield house
    house.close()


async def post(house: House, url: str = "/embeddings", /, **given: object) -> dict[str, Any]:
    async with house.client() as client:
        body = {"model": MODEL, "input": "hello", **given}
        answer: dict[str, Any] = (await client.post(url, json=body)).json()
    return answer


async def same_as(house: House, text: str, **given: object) -> bool:
    """Whether "hello", asked for so, is *text* asked for without any prompt."""
    asked, plain = await post(house, **given), await post(house, input=text, prompt="")
    assert asked["usage"]["prompt_tokens"] == len(text) + 2  # a byte a token, and the two ends
    return bool(asked == plain)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        pytest.param({}, "hello", id="nothing"),
        pytest.param({"prompt_name": "passage"}, "p: hello", id="a-name"),
        pytest.param({"prompt": "as asked: "}, "as asked: hello", id="a-literal"),
        pytest.param({"input_type": "query"}, "q: hello", id="query"),
        pytest.param({"input_type": "search_query"}, "q: hello", id="coheres-query"),
        pytest.param({"input_type": "retrieval.query"}, "q: hello", id="jinas-query"),
        pytest.param({"input_type": "passage"}, "p: hello", id="passage"),
        pytest.param({"input_type": "document"}, "p: hello", id="an-empty-prompt-gives-way"),
        pytest.param({"input_type": "search_document"}, "p: hello", id="coheres-document"),
        pytest.param({"input_type": "retrieval.passage"}, "p: hello", id="jinas-passage"),
        pytest.param({"input_type": "clustering"}, "c: hello", id="whatever-its-capitals"),
        pytest.param({"input_type": "QUERY"}, "q: hello", id="upper-case"),
        pytest.param({"input_type": "classification"}, "hello", id="a-kind-without-a-prompt"),
        pytest.param({"input_type": None, "prompt_name": None}, "hello", id="null"),
    ],
)
async def test_a_request_says_what_goes_before_its_texts(
    prompted: House, given: dict[str, object], text: str
) -> None:
    assert await same_as(prompted, text, **given)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        pytest.param({}, "q: hello", id="nothing"),
        pytest.param({"prompt": ""}, "hello", id="none-at-all"),
        pytest.param({"prompt_name": "document"}, "hello", id="an-empty-one"),
        pytest.param({"input_type": "document"}, "p: hello", id="another-kind"),
        pytest.param({"input_type": "classification"}, "q: hello", id="a-kind-without-a-prompt"),
    ],
)
async def test_a_default_prompt_gives_way_to_what_a_request_says(
    with_default: House, given: dict[str, object], text: str
) -> None:
    assert await same_as(with_default, text, **given)


async def test_a_model_without_prompts_takes_every_kind_of_text_as_it_is(house: House) -> None:
    assert await same_as(house, "hello", input_type="query")


async def test_every_text_of_a_request_has_the_prompt(prompted: House) -> None:
    asked = await post(prompted, input=["a", "b"], input_type="query")
    assert asked["data"] == (await post(prompted, input=["q: a", "q: b"]))["data"]


async def test_tokenize_the_answer_and_the_ledger_count_the_prompt(prompted: House) -> None:
    asked: dict[str, object] = {"input": ["a", "b"], "input_type": "query"}
    counted = await post(prompted, "/tokenize", **asked)
    embedded = await post(prompted, **asked)
    assert counted["total_tokens"] == embedded["usage"]["total_tokens"] == 12
    assert [row.token_count for row in prompted.store.rows] == [12]
    assert counted["data"][0]["token_ids"] == [0, *(byte + 4 for byte in b"q: a"), 2]


async def test_jinas_word_for_what_texts_are_picks_the_same_prompt(prompted: House) -> None:
    by_task = await post(prompted, task="retrieval.query")
    assert by_task == await post(prompted, input_type="query")
    assert by_task != await post(prompted, task="separation")  # which no prompt is for


async def test_models_show_their_prompts(with_default: House) -> None:
    async with with_default.client() as client:
        prompted = (await client.get(f"/models/{MODEL}")).json()
        plain = (await client.get(f"/models/{PLAIN_MODEL}")).json()
    assert (prompted["prompts"], prompted["default_prompt_name"]) == (PROMPTS, "query")
    assert (plain["prompts"], plain["default_prompt_name"]) == ({}, None)


@pytest.mark.parametrize(
    ("given", "param", "message"),
    [
        pytest.param(
            {"prompt_name": "Query"}, "prompt_name",
            "This model has no prompt called Query. It has: Clustering, document, passage, query.",
            id="a-name-the-model-has-not",
        ),
        pytest.param(
            {"prompt_name": "query", "model": PLAIN_MODEL}, "prompt_name",
            "This model has no prompt called query. It has: none.",
            id="a-model-without-any",
        ),
        pytest.param(
            {"input_type": "question"}, "input_type",
            "Invalid value for 'input_type' = question. Supported values: ['query', 'document', ",
            id="a-kind-nobody-knows",
        ),
        pytest.param(
            {"input_type": "query", "prompt": "x"}, "input_type",
            "'prompt' and 'input_type' both say what goes before each input. Send one of them.",
            id="two-at-once",
        ),
        pytest.param(
            {"task": "retrieval.query", "input_type": "query"}, "task",
            "'input_type' and 'task' both say what goes before each input. Send one of them.",
            id="in-two-words",
        ),
        pytest.param(
            {"prompt": "x" * 4097}, "prompt", "Invalid value for 'prompt'. ", id="a-very-long-one"
        ),
        pytest.param(
            {"prompt": "x", "input": [5, 6]}, "prompt",
            "'prompt' puts a prompt before texts, and 'input' holds token ids. ",
            id="before-token-ids",
        ),
        pytest.param(
            {"input_type": "query", "input": [[5], [6]]}, "input_type",
            "'input_type' puts a prompt before texts, and 'input' holds token ids. ",
            id="a-kind-of-token-ids",
        ),
    ],
)  # fmt: skip
async def test_a_prompt_that_cannot_be_is_refused(
    prompted: House, given: dict[str, object], param: str, message: str
) -> None:
    error = (await post(prompted, **given))["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert error["message"].startswith(message)
    assert not prompted.store.rows


LONG = {"long": "x" * 62, "document": "x" * 62}  # the model reads 64 tokens, with the two ends


@pytest.mark.parametrize(
    ("url", "given", "param"),
    [
        pytest.param(
            "/embeddings", {"truncate_prompt_tokens": 2}, "truncate_prompt_tokens", id="by-a-number"
        ),
        pytest.param("/embeddings", {"prompt": "x" * 62}, "prompt", id="by-a-literal"),
        pytest.param("/embeddings", {"prompt_name": "long"}, "prompt_name", id="by-a-name"),
        pytest.param("/embeddings", {"input_type": "document"}, "input_type", id="by-a-kind"),
        pytest.param("/embeddings", {"task": "retrieval.passage"}, "task", id="by-jinas-word"),
        pytest.param(
            "/rerank", {"query": "a", "documents": ["a"], "input": None}, None, id="by-the-model"
        ),
    ],
)
async def test_where_no_token_is_left_for_a_text_the_field_at_fault_is_the_faces_own(
    prompted: House, url: str, given: dict[str, object], param: str | None
) -> None:
    prompted.model.card = replace(CARD, prompts=LONG)
    error = (await post(prompted, url, truncate=True, **given))["error"]
    assert (error["message"], error["param"]) == ("None is left for the text itself.", param)


async def test_a_models_own_prompt_that_leaves_no_token_is_no_field_of_the_request(
    prompted: House,
) -> None:
    prompted.model.card = replace(CARD, prompts=LONG, default_prompt_name="long")
    error = (await post(prompted, truncate=True))["error"]
    assert (error["message"], error["param"]) == ("None is left for the text itself.", None)


@pytest.mark.parametrize(
    "given", [{}, {"input_type": "classification", "prompt": None}], ids=["a-default", "no-prompt"]
)
async def test_token_ids_are_embedded_as_they_are_sent(
    with_default: House, given: dict[str, object]
) -> None:
    if given:
        with_default.model.card = replace(CARD, prompts=PROMPTS)
    asked = await post(with_default, input=[5, 6], **given)
    assert asked["usage"]["prompt_tokens"] == 4
