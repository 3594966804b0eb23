"""Requests that keep the shape of good ones and break it somewhere: in process, by the thousand.

The long form is one command: `TRIVEC_FUZZ_EXAMPLES=50000 pytest tests/api/test_fuzz.py`.
"""

import asyncio
import json
import os
from collections.abc import Iterator
from typing import Any

import httpx
import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.api.house import ALIAS, MODEL, PLAIN_MODEL, House

from trivec.api.schemas import EmbeddingsResponse, ErrorResponse, TokenizeResponse

EXAMPLES = int(os.environ.get("TRIVEC_FUZZ_EXAMPLES", "300"))
thoroughly = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))

LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["", "float", "base64", "end", "dense&sparse", "multi", MODEL])
)
ANYTHING = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)
TOKEN_IDS = st.lists(st.integers(0, 999), min_size=1, max_size=40)
INPUTS = (
    st.text(min_size=1, max_size=100)
    | st.lists(st.text(min_size=1, max_size=30), min_size=1, max_size=5)
    | TOKEN_IDS
    | st.lists(TOKEN_IDS, min_size=1, max_size=4)
)
OUTPUT_WORDS = st.lists(st.sampled_from(["dense", "sparse", "multi", "colbert"]), min_size=1)
REQUIRED = {
    "model": st.sampled_from([MODEL, ALIAS, PLAIN_MODEL]) | ANYTHING,
    "input": INPUTS | ANYTHING,
}
OPTIONAL = {
    "encoding_format": st.sampled_from(["float", "base64", None]) | ANYTHING,
    "dimensions": st.integers(-1, 9) | ANYTHING,
    "user": st.text() | ANYTHING,
    "output_type": OUTPUT_WORDS | OUTPUT_WORDS.map("&".join) | ANYTHING,
    "truncate": st.sampled_from([True, False, "end", "start", "none"]) | ANYTHING,
    "return_tokens": st.booleans() | ANYTHING,
    "token_encoding": st.sampled_from(["model", "cl100k_base", "o200k_base"]) | ANYTHING,
    "input_type": st.sampled_from(["query", "document", "clustering"]) | ANYTHING,
    "prompt_name": ANYTHING,
    "prompt": st.text() | ANYTHING,
    "output_dimension": st.integers(-1, 9) | ANYTHING,
    "output_dtype": st.sampled_from(["float", "int8", "uint8", "binary", "ubinary"]) | ANYTHING,
    "truncation": st.booleans() | ANYTHING,
    "truncate_prompt_tokens": st.integers(-2, 70) | ANYTHING,
    "late_chunking": st.booleans() | ANYTHING,
    "chunk_size": st.integers(-1, 9) | ANYTHING,
    "stream": ANYTHING,
}
BODIES = st.fixed_dictionaries(REQUIRED, optional=OPTIONAL)
GOOD = st.fixed_dictionaries(
    {"model": st.just(MODEL), "input": INPUTS, "truncate": st.just("end")},
    optional={
        "encoding_format": st.sampled_from(["float", "base64"]),
        "output_type": OUTPUT_WORDS,
        "return_tokens": st.booleans(),
    },
)


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


def ask(runner: asyncio.Runner, house: House, path: str, body: bytes) -> httpx.Response:
    """The answer, once it is sure that nothing is left running behind it."""

    async def once() -> httpx.Response:
        async with house.client() as client:
            headers = {"content-type": "application/json"}
            response = await client.post(path, content=body, headers=headers)
        await asyncio.sleep(0)  # what was cancelled ends at its next turn
        assert asyncio.all_tasks() == {asyncio.current_task()}
        return response

    return runner.run(once())


def in_utf8(body: Any) -> bytes:
    return json.dumps(body, ensure_ascii=False).encode("utf-8", "surrogatepass")


@given(body=BODIES, path=st.sampled_from(["/embeddings", "/tokenize"]))
@thoroughly
def test_whatever_is_broken_is_refused_in_the_error_shape(
    runner: asyncio.Runner, shared_house: House, body: Any, path: str
) -> None:
    response = ask(runner, shared_house, path, in_utf8(body))
    assert response.status_code in {200, 400, 404}, response.text
    if response.status_code == 200:
        kind = EmbeddingsResponse if path == "/embeddings" else TokenizeResponse
        msgspec.json.decode(response.content, type=kind)
    else:
        msgspec.json.decode(response.content, type=ErrorResponse)


@given(body=GOOD)
@thoroughly
def test_whatever_is_sound_is_embedded_and_counted_alike(
    runner: asyncio.Runner, shared_house: House, body: Any
) -> None:
    response = ask(runner, shared_house, "/embeddings", in_utf8(body))
    assert response.status_code == 200, response.text
    answer = msgspec.json.decode(response.content, type=EmbeddingsResponse)
    counted = ask(
        runner,
        shared_house,
        "/tokenize",
        in_utf8({"model": body["model"], "input": body["input"]}),
    )
    tokens = msgspec.json.decode(counted.content, type=TokenizeResponse)
    assert len(answer.data) == len(tokens.data)
    kept = [min(text.token_count, tokens.token_count_max) for text in tokens.data]
    assert answer.usage.prompt_tokens == sum(kept)
    cut = [datum.truncated is not None for datum in answer.data]
    assert cut == [not text.fits for text in tokens.data]


@given(body=st.binary(max_size=200))
@thoroughly
def test_any_bytes_at_all_are_refused_in_the_error_shape(
    runner: asyncio.Runner, shared_house: House, body: bytes
) -> None:
    response = ask(runner, shared_house, "/embeddings", body)
    assert response.status_code in (400, 404)  # 404: JSON by chance, of no model
    msgspec.json.decode(response.content, type=ErrorResponse)
