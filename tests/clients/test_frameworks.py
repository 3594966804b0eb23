"""LangChain and LlamaIndex work unchanged with nothing but a base URL and a key."""

import math
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest
from tests.process.server import Server

COMES_WITH = "comes with: make test-clients"
MODEL = "all-minilm-l6-v2"
TEXTS = ["A cat sits on the mat.", "On the mat there is a cat.", "Interest rates rose again."]


def cosine(a: list[float], b: list[float]) -> float:
    """Of two vectors of length 1."""
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def assert_near_neighbours(vectors: list[list[float]]) -> None:
    assert [len(vector) for vector in vectors] == [384, 384, 384]
    assert cosine(vectors[0], vectors[1]) > 0.8 > 0.3 > cosine(vectors[0], vectors[2])


@pytest.fixture
def http() -> Iterator[httpx.Client]:
    """The frameworks leave their own connections open at the end."""
    with httpx.Client() as client:
        yield client


@pytest.fixture
async def http_async() -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient() as client:
        yield client


def langchain(base_url: str, server: Server, **client: object) -> Any:
    library = pytest.importorskip("langchain_openai", reason=COMES_WITH)
    return library.OpenAIEmbeddings(
        model=MODEL,
        base_url=base_url,
        api_key=server.key,
        check_embedding_ctx_length=False,
        **client,
    )


def test_langchain_embeds_documents_and_queries(
    base_url: str, server: Server, http: httpx.Client
) -> None:
    embeddings = langchain(base_url, server, http_client=http)
    assert_near_neighbours(embeddings.embed_documents(TEXTS))
    assert embeddings.embed_query(TEXTS[0]) == embeddings.embed_documents(TEXTS)[0]


async def test_langchain_embeds_asynchronously(
    base_url: str, server: Server, http_async: httpx.AsyncClient
) -> None:
    embeddings = langchain(base_url, server, http_async_client=http_async)
    assert_near_neighbours(await embeddings.aembed_documents(TEXTS))


def test_llama_index_embeds_texts_and_queries(
    base_url: str, server: Server, http: httpx.Client
) -> None:
    llama = pytest.importorskip("llama_index.embeddings.openai_like", reason=COMES_WITH)
    embedding = llama.OpenAILikeEmbedding(
        model_name=MODEL,
        api_base=base_url,
        api_key=server.key,
        embed_batch_size=2,
        http_client=http,
    )
    vectors = embedding.get_text_embedding_batch(TEXTS)
    assert_near_neighbours(vectors)
    assert embedding.get_query_embedding(TEXTS[0]) == vectors[0]
