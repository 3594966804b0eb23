"""What is wrong with a request is said exactly, before any model is touched."""

import json

import httpx
import pytest
from tests.api.house import MODEL, PLAIN_MODEL, House

from trivec.api.admin import CreateKeyRequest
from trivec.api.batches import CreateBatchRequest
from trivec.api.rerank import RerankRequest
from trivec.api.schemas import decoder_of
from trivec.api.tei import SimilarityRequest
from trivec.core.errors import FieldInvalid

LIST = "Supported values: "


async def refusal(house: House, **given: object) -> tuple[str, str | None]:
    """Message and param of the 400 that the request gets; the model has not seen it."""
    async with house.client() as client:
        body = {"model": MODEL, "input": "hello", **given}
        response = await client.post("/embeddings", json={k: v for k, v in body.items() if v != ()})
    assert_refused(response)
    assert not house.model.embedded
    error = response.json()["error"]
    return error["message"], error["param"]


def assert_refused(response: httpx.Response) -> None:
    assert response.status_code == 400, response.text
    assert response.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("given", "message", "param"),
    [
        pytest.param({"model": ()}, "you must provide a model parameter", "model", id="no-model"),
        pytest.param(
            {"model": None}, "you must provide a model parameter", "model", id="null-model"
        ),
        pytest.param({"input": ()}, "you must provide an input parameter", "input", id="no-input"),
        pytest.param(
            {"encoding_format": "md5"},
            "Invalid value for 'encoding_format' = md5. Supported values: ['float', 'base64'].",
            "encoding_format",
            id="an-encoding-nobody-knows",
        ),
        pytest.param(
            {"truncate": "MIDDLE"},
            "Invalid value for 'truncate' = MIDDLE. Supported values: ['none', 'end', 'start'].",
            "truncate",
            id="a-side-nobody-knows",
        ),
        pytest.param(
            {"token_encoding": "p50k_base"},
            "Invalid value for 'token_encoding' = p50k_base. "
            "Supported values: ['model', 'cl100k_base', 'o200k_base'].",
            "token_encoding",
            id="an-encoding-of-token-ids-nobody-knows",
        ),
        pytest.param(
            {"encoding_format": ""},
            "Invalid value for 'encoding_format' = ''. Supported values: ['float', 'base64'].",
            "encoding_format",
            id="an-encoding-of-no-letters",
        ),
        pytest.param(
            {"dimensions": 4},
            "This model does not support specifying dimensions.",
            "dimensions",
            id="dimensions-the-model-was-not-trained-for",
        ),
        pytest.param(
            {"dimensions": 9, "model": PLAIN_MODEL},
            "Invalid value for 'dimensions' = 9. This model's vectors have at most 8.",
            "dimensions",
            id="more-dimensions-than-there-are",
        ),
        pytest.param(
            {"output_type": "sparse&multi", "model": PLAIN_MODEL},
            "This model has no sparse and no multi output; it has dense.",
            "output_type",
            id="outputs-the-model-has-not",
        ),
        pytest.param(
            {"input": ["a"] * 2049},
            "Invalid 'input': array too long. Expected an array with maximum length 2048, "
            "but got an array with length 2049 instead.",
            "input",
            id="too-many-texts",
        ),
        pytest.param(
            {"trunkate": True},
            "Unrecognized request argument supplied: trunkate. Remove it, or correct its name.",
            "trunkate",
            id="a-misspelt-field",
        ),
        pytest.param(
            {"\u202etrunkate\n": True},
            "Unrecognized request argument supplied: \\u202etrunkate\\n. Remove it, or correct its "
            "name.",
            "\\u202etrunkate\\n",
            id="a-field-that-would-turn-the-line-around",
        ),
        pytest.param(
            {"input": [[5, 1000]]},
            "Token id 1000 is outside this model's vocabulary of 1000 ids. "
            "Send the text itself, or ids of this model's own tokenizer. In LangChain's "
            "OpenAIEmbeddings set check_embedding_ctx_length=False. If they are OpenAI's, "
            'send "token_encoding": "cl100k_base" (or "o200k_base") and they are made into texts '
            "again.",
            "input[0][1]",
            id="a-foreign-token-id",
        ),
    ],
)
async def test_the_message_is_the_one_that_clients_know(
    house: House, given: dict[str, object], message: str, param: str
) -> None:
    assert await refusal(house, **given) == (message, param)


@pytest.mark.parametrize(
    ("given", "param"),
    [
        pytest.param({"model": 7}, "model", id="model-a-number"),
        pytest.param({"input": None}, "input", id="input-null"),
        pytest.param({"input": 7}, "input", id="input-a-number"),
        pytest.param({"input": {}}, "input", id="input-an-object"),
        pytest.param({"input": []}, "input", id="input-empty"),
        pytest.param({"input": [""]}, "input[0]", id="an-empty-text-alone"),
        pytest.param({"input": [[]]}, "input[0]", id="an-empty-list-of-ids"),
        pytest.param({"input": [[5], []]}, "input[1]", id="an-empty-list-of-ids-among-others"),
        pytest.param({"input": ["a", 5]}, "input[1]", id="a-text-and-an-id"),
        pytest.param({"input": [5, [6]]}, "input[1]", id="an-id-and-a-list"),
        pytest.param({"input": ["a", None]}, "input[1]", id="null-among-texts"),
        pytest.param({"input": [True]}, "input[0]", id="true-is-no-token-id"),
        pytest.param({"input": [5, False]}, "input[1]", id="false-is-no-token-id"),
        pytest.param({"input": [5.0]}, "input[0]", id="a-float-is-no-token-id"),
        pytest.param({"input": [[5, "a"]]}, "input[0][1]", id="a-text-among-ids"),
        pytest.param({"input": [[[5]]]}, "input[0][0]", id="three-deep"),
        pytest.param({"input": [-1]}, "input[0]", id="a-negative-id"),
        pytest.param({"input": [5, 2**31]}, "input[1]", id="an-id-of-32-bits"),
        pytest.param({"input": [5, 2**63]}, "input[1]", id="an-id-of-64-bits"),
        pytest.param({"input": [[5], [2**80]]}, "input[1][0]", id="an-id-of-80-bits"),
        pytest.param({"input": [10**4000]}, "input[0]", id="an-absurd-id"),
        pytest.param({"dimensions": 0}, "dimensions", id="no-dimensions"),
        pytest.param({"dimensions": True}, "dimensions", id="true-is-no-number"),
        pytest.param({"dimensions": 2**70}, "dimensions", id="absurd-dimensions"),
        pytest.param({"user": 7}, "user", id="user-a-number"),
        pytest.param({"output_type": "thick"}, "output_type", id="an-output-nobody-knows"),
        pytest.param({"output_type": "dense&"}, "output_type", id="a-dangling-join"),
        pytest.param({"output_type": []}, "output_type", id="no-outputs"),
        pytest.param({"output_type": [7]}, "output_type[0]", id="an-output-a-number"),
        pytest.param({"return_tokens": "yes"}, "return_tokens", id="yes-is-no-boolean"),
        pytest.param({"truncate": 1}, "truncate", id="one-is-no-boolean"),
        pytest.param({"x" * 500: 1}, "x" * 80 + "…", id="a-very-long-name"),
    ],
)
async def test_the_field_at_fault_is_named(
    house: House, given: dict[str, object], param: str
) -> None:
    _, named = await refusal(house, **given)
    assert named == param


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b'{"model":"m","input":"a"} x', id="something-after-the-object"),
        pytest.param('{"model":"m","input":"a"}'.encode("utf-16"), id="utf-16"),
        pytest.param(b'{"model":"m","input":NaN}', id="nan"),
        pytest.param(b'{"model":"m","input":"\\ud800\\ud800"}', id="two-high-surrogates"),
        pytest.param(b'{"model":"m","input":"\xed\xa0\x80"}', id="an-encoded-surrogate"),
        pytest.param(b'{"model":"m","input":"a\nb"}', id="a-bare-line-break"),
        pytest.param(b"[" * 100_000, id="brackets-without-end"),
        pytest.param(b'{"a":' * 100_000, id="objects-without-end"),
        pytest.param(b"null", id="null"),
        pytest.param(b'"text"', id="a-bare-text"),
    ],
)
async def test_what_is_no_json_object_in_utf_8_is_refused(house: House, body: bytes) -> None:
    async with house.client() as client:
        headers = {"content-type": "application/json"}
        response = await client.post("/embeddings", content=body, headers=headers)
    assert_refused(response)


@pytest.mark.parametrize(
    ("route", "given", "message", "param"),
    [
        pytest.param(
            "/batches",
            {"completion_window": "1d"},
            "Invalid value for 'completion_window'. Expected: 24h as at OpenAI, or any other number "
            "of hours up to 336h.",
            "completion_window",
            id="a-form-in-words-and-not-as-a-regular-expression",
        ),
        pytest.param(
            "/batches",
            {"metadata": {"k" * 65: "v"}},
            "Invalid key in 'metadata'. Expected `str` of length <= 64.",
            "metadata",
            id="a-key-of-a-mapping",
        ),
        pytest.param(
            "/batches",
            {"metadata": {"k": 1}},
            "Invalid type for 'metadata': expected str, but got int instead.",
            "metadata",
            id="a-value-of-a-mapping",
        ),
        pytest.param(
            "/batches",
            {"output_expires_after": {"anchor": "now", "seconds": 3600}},
            "Invalid value for 'output_expires_after.anchor' = now. Supported values: "
            "['created_at'].",
            "output_expires_after.anchor",
            id="a-word-of-a-structure-within",
        ),
        pytest.param(
            "/admin/v1/keys",
            {"name": "a", "expires": "2027-01-31"},
            "Invalid value for 'expires'. Expected: An instant in RFC 3339, as "
            "2027-01-31T00:00:00Z.",
            "expires",
            id="an-instant",
        ),
    ],
)
def test_a_structure_says_what_it_expected_and_where(
    route: str, given: dict[str, object], message: str, param: str
) -> None:
    kind = CreateBatchRequest if route == "/batches" else CreateKeyRequest
    batch = {"input_file_id": "f", "endpoint": "/v1/embeddings", "completion_window": "24h"}
    with pytest.raises(FieldInvalid) as refused:
        decoder_of(kind).decode(json.dumps((batch if route == "/batches" else {}) | given).encode())
    assert (str(refused.value), refused.value.param) == (message, param)


def test_half_of_a_surrogate_pair_is_found_in_a_structure_within() -> None:
    body = b'{"model": "m", "query": "q", "documents": ["a", {"text": "\\ud800"}]}'
    with pytest.raises(FieldInvalid) as refused:
        decoder_of(RerankRequest).decode(body)
    assert refused.value.param == "documents[1].text"


def test_words_of_a_structure_within_may_be_of_any_case() -> None:
    inputs = b'"inputs": {"source_sentence": "a", "sentences": ["b"]}'
    body = b'{%b, "parameters": {"truncation_direction": "Left"}}' % inputs
    asked = decoder_of(SimilarityRequest).decode(body)
    assert asked.parameters is not None
    assert asked.parameters.truncation_direction == "left"


async def test_of_duplicate_keys_the_last_wins(house: House) -> None:
    body = b'{"model":"%b","input":"first","input":"the second"}' % MODEL.encode()
    async with house.client() as client:
        headers = {"content-type": "application/json"}
        response = await client.post("/embeddings", content=body, headers=headers)
    assert response.json()["usage"]["prompt_tokens"] == len("the second") + 2


@pytest.mark.parametrize(
    ("content_type", "status"),
    [
        pytest.param("application/json", 200, id="plain"),
        pytest.param("application/json; charset=utf-8", 200, id="with-utf-8"),
        pytest.param('Application/JSON;charset="UTF-8"', 200, id="in-another-hand"),
        pytest.param("application/json; charset=latin-1", 415, id="another-charset"),
        pytest.param("application/x-www-form-urlencoded", 415, id="a-form"),
        pytest.param("application/jsonx", 415, id="almost"),
        pytest.param("", 415, id="nothing"),
    ],
)
async def test_the_body_must_be_declared_as_json(
    house: House, content_type: str, status: int
) -> None:
    body = b'{"model":"%b","input":"a"}' % MODEL.encode()
    async with house.client() as client:
        headers = {"content-type": content_type}
        response = await client.post("/embeddings", content=body, headers=headers)
    assert response.status_code == status
    assert ("Content-Type (none) is not supported" in response.text) == (content_type == "")


async def test_a_client_is_told_which_models_there_are(house: House) -> None:
    async with house.client() as client:
        response = await client.post("/embeddings", json={"model": "BGE", "input": "a"})
    assert response.json()["error"]["message"] == (
        "The model `BGE` does not exist or you do not have access to it. "
        f"Served here: {MODEL}, {PLAIN_MODEL}."
    )
