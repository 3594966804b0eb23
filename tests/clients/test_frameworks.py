"""Frameworks work unchanged with nothing but a base URL and a key, or say what they need."""

import hashlib
import math
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from tests.clients.conftest import assert_same_vectors
from tests.process.server import Server, running
from tests.support.dummy import blueprint_of, write_dummy

from trivec.tokenizer.encodings import table_bytes

COMES_WITH = "comes with: make test-clients"
MODEL, BGE_M3 = "all-minilm-l6-v2", "baai/bge-m3"
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


def langchain(base_url: str, server: Server, model: str = MODEL, **options: object) -> Any:
    library = pytest.importorskip("langchain_openai", reason=COMES_WITH)
    settings = {"check_embedding_ctx_length": False, **options}
    return library.OpenAIEmbeddings(model=model, base_url=base_url, api_key=server.key, **settings)


def test_langchain_embeds_documents_and_queries(
    base_url: str, server: Server, http: httpx.Client
) -> None:
    embeddings = langchain(base_url, server, http_client=http)
    assert_near_neighbours(embeddings.embed_documents(TEXTS))
    queried = embeddings.embed_query(TEXTS[0])
    assert_same_vectors([queried], embeddings.embed_documents(TEXTS)[:1])


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
    assert_same_vectors([embedding.get_query_embedding(TEXTS[0])], vectors[:1])


@pytest.mark.usefixtures("tiktoken_cache")
@pytest.mark.parametrize(
    ("text", "code"),
    [
        pytest.param(
            "A young child is riding a horse through the field.",
            "token_ids_foreign",
            id="in-the-vocabulary",
        ),
        pytest.param(TEXTS[2], None, id="beyond-the-vocabulary"),
    ],
)
def test_langchain_with_its_defaults_is_told_the_setting_it_needs(
    base_url: str, server: Server, http: httpx.Client, text: str, code: str | None
) -> None:
    embeddings = langchain(base_url, server, http_client=http, check_embedding_ctx_length=True)
    with pytest.raises(openai.BadRequestError, match="check_embedding_ctx_length=False") as refusal:
        embeddings.embed_documents([text])
    assert refusal.value.code == code


@pytest.fixture(scope="module")
def repairing_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of both models that takes arrays of ids for cl100k_base's."""
    pytest.importorskip("tiktoken", reason=COMES_WITH)
    folder: Path = tmp_path_factory.mktemp("data")
    write_dummy(folder / "model", blueprint_of(BGE_M3).with_layers(1))
    models = ("--model", MODEL, "--model", f"{BGE_M3}={folder / 'model'}", "--precision", "fp32")
    with running(folder, *models, "--token-encoding", "cl100k_base") as started:
        yield started


@pytest.fixture
def tiktoken_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """cl100k_base where tiktoken keeps what it has fetched."""
    address = "https://openaipublic.blob.core.windows.net/encodings/cl100k_base.tiktoken"
    file = tmp_path / hashlib.sha1(address.encode(), usedforsecurity=False).hexdigest()
    file.write_bytes(table_bytes("cl100k_base"))
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))


@pytest.mark.usefixtures("tiktoken_cache")
@pytest.mark.parametrize("model", [MODEL, BGE_M3])
def test_langchain_with_its_defaults_gets_the_vectors_of_its_texts_where_ids_are_repaired(
    repairing_server: Server, http: httpx.Client, model: str
) -> None:
    """In batches of 1,000 arrays, as its default is."""
    base_url = f"{repairing_server.url}/v1"
    texts = [f"{text} {i}" for i in range(350) for text in (*TEXTS, "Zürich 日本語 😀")]
    sends_ids = langchain(
        base_url, repairing_server, model, http_client=http, check_embedding_ctx_length=True
    )
    sends_texts = langchain(base_url, repairing_server, model, http_client=http)
    expected = sends_texts.embed_documents(texts)
    assert_same_vectors(sends_ids.embed_documents(texts), expected)
    for client in (sends_ids, sends_texts):
        assert_same_vectors([client.embed_query(texts[0])], expected[:1])


def test_haystack_embeds_documents_and_queries(
    base_url: str, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    haystack = pytest.importorskip("haystack", reason=COMES_WITH)
    embedders = pytest.importorskip("haystack.components.embedders", reason=COMES_WITH)
    monkeypatch.setenv("OPENAI_API_KEY", server.key)
    settings = {"model": MODEL, "api_base_url": base_url}
    of_documents = embedders.OpenAIDocumentEmbedder(progress_bar=False, **settings)
    of_texts = embedders.OpenAITextEmbedder(**settings)
    try:
        documents = of_documents.run([haystack.Document(content=text) for text in TEXTS])
        query = of_texts.run(TEXTS[0])
    finally:
        of_documents.close()
        of_texts.close()
    vectors = [document.embedding for document in documents["documents"]]
    assert_near_neighbours(vectors)
    assert_same_vectors([query["embedding"]], vectors[:1])


def test_mteb_embeds_by_the_call_of_its_openai_wrapper(base_url: str, server: Server) -> None:
    # As mteb 2.26.24 calls it (mteb/models/model_implementations/openai_models.py) for a model
    # whose size it was told; the package itself brings torch.
    with openai.OpenAI(base_url=base_url, api_key=server.key) as client:
        answer = client.embeddings.create(
            input=TEXTS, model=MODEL, encoding_format="float", dimensions=384
        )
    assert_near_neighbours([row.embedding for row in answer.data])
