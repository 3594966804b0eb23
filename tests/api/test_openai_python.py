"""The official Python client, unchanged, sync and async, through a real socket, under every prefix."""

from collections.abc import Iterator

import openai
import pytest
from tests.api.house import MODEL, PLAIN_MODEL, House

from trivec.accounts import RateLimits
from trivec.api.app import PREFIXES


@pytest.fixture(params=PREFIXES)
def client(
    request: pytest.FixtureRequest, shared_house: House, address: str
) -> Iterator[openai.OpenAI]:
    base_url = address + request.param
    with openai.OpenAI(base_url=base_url, api_key=shared_house.key, max_retries=0) as made:
        yield made


def test_its_default_encoding_and_floats_give_the_same_vector(client: openai.OpenAI) -> None:
    usual = client.embeddings.create(model=MODEL, input="hello")
    floats = client.embeddings.create(model=MODEL, input="hello", encoding_format="float")
    packed = client.embeddings.create(model=MODEL, input="hello", encoding_format="base64")
    assert usual.data == floats.data
    assert type(packed.data[0].embedding) is not list  # it asked for base64, and got it
    assert len(usual.data[0].embedding) == 8
    assert usual.model == MODEL
    assert usual.usage.prompt_tokens == usual.usage.total_tokens == 7


def test_it_sends_texts_and_token_ids(client: openai.OpenAI) -> None:
    texts = client.embeddings.create(model=MODEL, input=["hello", " "])
    ids = client.embeddings.create(model=MODEL, input=[5, 6, 7])
    lists = client.embeddings.create(model=MODEL, input=[[5, 6], [7]])
    assert [datum.index for datum in texts.data] == [0, 1]
    assert (len(ids.data), len(lists.data)) == (1, 2)


async def test_its_async_form_gives_the_same_vectors(
    client: openai.OpenAI, shared_house: House
) -> None:
    base_url = client.base_url
    async with openai.AsyncOpenAI(base_url=base_url, api_key=shared_house.key) as other:
        found = await other.embeddings.create(model=MODEL, input=["hello", "a"])
    expected = client.embeddings.create(model=MODEL, input=["hello", "a"])
    assert found.data == expected.data


def test_it_reads_sparse_and_multi_vectors_as_extra_fields(client: openai.OpenAI) -> None:
    answer = client.embeddings.create(
        model=MODEL, input="hello", extra_body={"output_type": ["sparse", "multi"]}
    )
    datum = answer.data[0].model_dump()
    assert datum["embedding"] == []
    assert set(datum["sparse_embedding"]) == {"encoding", "indices", "values"}
    assert datum["multi_embedding"]["shape"] == [6, 8]


def test_it_lists_and_shows_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL, PLAIN_MODEL]
    assert client.models.retrieve(MODEL).owned_by == "BAAI"


def test_failures_are_its_own_typed_exceptions(
    client: openai.OpenAI, shared_house: House, address: str
) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        client.embeddings.create(model="nope", input="a")
    assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
    assert unknown.value.request_id is not None
    assert unknown.value.request_id.startswith("req_")
    with pytest.raises(openai.BadRequestError) as bad:
        client.embeddings.create(model=MODEL, input=["a", ""])
    assert (bad.value.type, bad.value.param) == ("invalid_request_error", "input[1]")
    stranger = client.with_options(api_key="wrong")
    with pytest.raises(openai.AuthenticationError):
        stranger.embeddings.create(model=MODEL, input="a")


def test_a_used_up_allowance_is_a_rate_limit_that_it_can_wait_out(house: House) -> None:
    key = house.new_key("one", allowance=RateLimits(requests_per_minute=1))
    with house.listening() as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0)
        client.embeddings.create(model=MODEL, input="a")
        with pytest.raises(openai.RateLimitError) as limited:
            client.embeddings.create(model=MODEL, input="a")
        client.close()
    assert limited.value.type == "requests"
    assert limited.value.code == "rate_limit_exceeded"
    assert 1 <= int(limited.value.response.headers["retry-after"]) <= 60


def test_its_own_read_timeout_becomes_the_deadline(house: House) -> None:
    with house.listening() as address:
        timeout = openai.Timeout(30.0, read=12.0)
        client = openai.OpenAI(base_url=f"{address}/v1", api_key=house.key, timeout=timeout)
        client.embeddings.create(model=MODEL, input="a")
        client.close()
    _, _, timeout_s = house.model.embedded[0]
    assert timeout_s == pytest.approx(12.0)
