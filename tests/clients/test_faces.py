"""Clients of other APIs work unchanged against their face, with nothing but an address and a key."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from tests.clients.apart import run_apart
from tests.clients.conftest import assert_same_vectors
from tests.process.server import Server, running

COMES_WITH = "comes with: make test-clients"
MODEL = "all-minilm-l6-v2"
TEXTS = ["A cat sits on the mat.", "On the mat there is a cat.", "Interest rates rose again."]
QUERY = "Where is the cat?"


@pytest.fixture(scope="session")
def expected(server: Server) -> list[list[float]]:
    """The vectors of the texts, by OpenAI's face."""
    answer = httpx.post(
        f"{server.url}/v1/embeddings",
        json={"model": MODEL, "input": TEXTS},
        headers={"authorization": f"Bearer {server.key}"},
        timeout=60,
    )
    return [one["embedding"] for one in answer.json()["data"]]


def assert_best_first(places: Sequence[int], scores: Sequence[float]) -> None:
    assert sorted(places[:2]) == [0, 1]
    assert list(scores) == sorted(scores, reverse=True)


def test_cohere_embeds_and_reranks(server: Server, expected: list[list[float]]) -> None:
    cohere = pytest.importorskip("cohere", reason=COMES_WITH)
    with httpx.Client() as http:
        client = cohere.ClientV2(server.key, base_url=server.url, httpx_client=http)
        embedded = client.embed(
            model=MODEL,
            texts=TEXTS,
            input_type="search_document",
            embedding_types=["float", "int8", "ubinary"],
        )
        ranked = client.rerank(model=MODEL, query=QUERY, documents=TEXTS, top_n=3)
        with pytest.raises(cohere.NotFoundError, match="nobody"):
            client.rerank(model="nobody", query=QUERY, documents=TEXTS)
    assert_same_vectors(embedded.embeddings.float_, expected)
    assert [len(row) for row in embedded.embeddings.int8] == [384] * 3
    assert [len(row) for row in embedded.embeddings.ubinary] == [48] * 3
    assert embedded.meta.billed_units.input_tokens > 0
    assert_best_first(
        [one.index for one in ranked.results], [one.relevance_score for one in ranked.results]
    )
    assert ranked.meta.billed_units.search_units == 1


def test_coheres_first_version_reranks(server: Server) -> None:
    cohere = pytest.importorskip("cohere", reason=COMES_WITH)
    with httpx.Client() as http:
        client = cohere.Client(server.key, base_url=server.url, httpx_client=http)
        ranked = client.rerank(model=MODEL, query=QUERY, documents=TEXTS, return_documents=True)
    assert ranked.results[0].document.text in TEXTS[:2]


def test_ollama_embeds_lists_and_shows(server: Server, expected: list[list[float]]) -> None:
    ollama = pytest.importorskip("ollama", reason=COMES_WITH)
    client = ollama.Client(host=server.url, headers={"Authorization": f"Bearer {server.key}"})
    with client._client:
        assert_same_vectors(client.embed(MODEL, TEXTS).embeddings, expected)
        assert_same_vectors(client.embed(f"{MODEL}:latest", TEXTS[0]).embeddings, expected[:1])
        assert_same_vectors([client.embeddings(MODEL, TEXTS[0]).embedding], expected[:1])
        assert [one.model for one in client.list().models] == [MODEL]
        assert client.show(MODEL).capabilities == ["embedding"]
        with pytest.raises(ollama.ResponseError, match="nobody") as refused:
            client.embed("nobody", TEXTS)
    assert refused.value.status_code == 404


def test_hugging_faces_client_extracts_features_and_compares(
    server: Server, expected: list[list[float]]
) -> None:
    hub = pytest.importorskip("huggingface_hub", reason=COMES_WITH)
    assert_same_vectors(
        hub.InferenceClient(model=server.url, token=server.key).feature_extraction(text=TEXTS),
        expected,
    )
    by_route = hub.InferenceClient(model=f"{server.url}/embed", token=server.key)
    assert_same_vectors(
        by_route.feature_extraction(TEXTS[0], truncate=True, truncation_direction="Right"),
        expected[:1],
    )
    similar = hub.InferenceClient(model=f"{server.url}/similarity", token=server.key)
    found = similar.sentence_similarity(TEXTS[0], other_sentences=TEXTS[1:])
    assert found == pytest.approx((np.array(expected[1:]) @ np.array(expected[0])).tolist())
    refused = hub.InferenceClient(model=f"{server.url}/embed", token="tv_wrong")
    with pytest.raises(hub.errors.HfHubHTTPError) as error:
        refused.feature_extraction(TEXTS[0])
    assert error.value.response.status_code == 401
    hub.close_session()


HUGGING_FACE = """
import json, sys
from langchain_huggingface import HuggingFaceEndpointEmbeddings

embeddings = HuggingFaceEndpointEmbeddings(model=sys.argv[1])
texts = json.loads(sys.argv[2])
print(json.dumps([embeddings.embed_documents(texts), embeddings.embed_query(texts[0])]))
"""


def test_langchains_hugging_face_endpoint_embeds(
    server: Server, expected: list[list[float]], tmp_path: Path
) -> None:
    environment = {"HUGGINGFACEHUB_API_TOKEN": server.key}
    printed = run_apart(HUGGING_FACE, server.url, json.dumps(TEXTS), folder=tmp_path, **environment)
    documents, query = json.loads(printed.splitlines()[-1])
    assert_same_vectors(documents, expected)
    assert_same_vectors([query], expected[:1])


@pytest.fixture(scope="module", params=["results", "data"])
def reranking_server(
    request: pytest.FixtureRequest, server: Server, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """A server with its defaults, and one that answers reranks in Voyage's form."""
    if request.param == "results":
        yield server
        return
    with running(tmp_path_factory.mktemp("voyage"), "--rerank-answer", "data") as started:
        yield started


def test_voyages_client_reranks_with_either_form(reranking_server: Server) -> None:
    voyageai = pytest.importorskip("voyageai", reason=COMES_WITH)
    server = reranking_server
    client = voyageai.Client(server.key, base_url=f"{server.url}/v1")
    ranked = client.rerank(QUERY, TEXTS, model=MODEL, top_k=2)
    assert_best_first(
        [one.index for one in ranked.results], [one.relevance_score for one in ranked.results]
    )
    assert [one.document for one in ranked.results] == [TEXTS[one.index] for one in ranked.results]
    assert (len(ranked.results), ranked.total_tokens > 0) == (2, True)


def test_voyage_embeds(server: Server, expected: list[list[float]]) -> None:
    voyageai = pytest.importorskip("voyageai", reason=COMES_WITH)
    client = voyageai.Client(server.key, base_url=f"{server.url}/v1")
    embedded = client.embed(TEXTS, model=MODEL, input_type="document")
    assert_same_vectors(embedded.embeddings, expected)
    small = client.embed(TEXTS, model=MODEL, output_dtype="int8")
    assert all(isinstance(number, int) for number in small.embeddings[0])


@pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecationWarning")  # of cohere's
def test_langchains_cohere_embeds_and_reranks(server: Server, expected: list[list[float]]) -> None:
    langchain = pytest.importorskip("langchain_cohere", reason=COMES_WITH)
    options = {"model": MODEL, "cohere_api_key": server.key, "base_url": server.url}
    embeddings = langchain.CohereEmbeddings(**options)
    with embeddings.client:
        assert_same_vectors(embeddings.embed_documents(TEXTS), expected)
        assert_same_vectors([embeddings.embed_query(TEXTS[0])], expected[:1])
    compressor = langchain.CohereRerank(**options)
    with compressor.client:
        ranked = compressor.rerank(TEXTS, QUERY)
    assert_best_first([one["index"] for one in ranked], [one["relevance_score"] for one in ranked])


def test_langchains_ollama_embeds(server: Server, expected: list[list[float]]) -> None:
    langchain = pytest.importorskip("langchain_ollama", reason=COMES_WITH)
    headers = {"headers": {"Authorization": f"Bearer {server.key}"}}
    embeddings = langchain.OllamaEmbeddings(
        model=MODEL, base_url=server.url, client_kwargs=headers, validate_model_on_init=True
    )
    with closing(embeddings._client):
        assert_same_vectors(embeddings.embed_documents(TEXTS), expected)
        assert_same_vectors([embeddings.embed_query(TEXTS[0])], expected[:1])


def test_langchains_jina_embeds_and_reranks(
    server: Server, expected: list[list[float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes no address, which is therefore put in place of Jina's."""
    jina = pytest.importorskip("langchain_community.embeddings.jina", reason=COMES_WITH)
    rerank = pytest.importorskip(
        "langchain_community.document_compressors.jina_rerank", reason=COMES_WITH
    )
    monkeypatch.setattr(jina, "JINA_API_URL", f"{server.url}/v1/embeddings")
    monkeypatch.setattr(rerank, "JINA_API_URL", f"{server.url}/v1/rerank")
    embeddings = jina.JinaEmbeddings(jina_api_key=server.key, model_name=MODEL)
    with embeddings.session:
        assert_same_vectors(embeddings.embed_documents(TEXTS), expected)
    compressor = rerank.JinaRerank(jina_api_key=server.key, model=MODEL)
    with compressor.session:
        ranked = compressor.rerank(TEXTS, QUERY)
    assert_best_first([one["index"] for one in ranked], [one["relevance_score"] for one in ranked])


def llama_tei(server: Server) -> Any:
    llama = pytest.importorskip(
        "llama_index.embeddings.text_embeddings_inference", reason=COMES_WITH
    )
    return llama.TextEmbeddingsInference(
        model_name=MODEL, base_url=server.url, auth_token=server.key
    )


def llama_ollama(server: Server) -> Any:
    llama = pytest.importorskip("llama_index.embeddings.ollama", reason=COMES_WITH)
    headers = {"headers": {"Authorization": f"Bearer {server.key}"}}
    return llama.OllamaEmbedding(model_name=MODEL, base_url=server.url, client_kwargs=headers)


@pytest.mark.parametrize("make", [llama_tei, llama_ollama], ids=["tei", "ollama"])
def test_llama_indexs_embeddings_embed(
    server: Server, expected: list[list[float]], make: Callable[[Server], Any]
) -> None:
    embedding = make(server)
    # Ollama's keeps a connection, and puts no prefix; TEI's puts one that it knows of the model.
    with nullcontext() if make is llama_tei else closing(embedding._client):
        assert_same_vectors(embedding.get_text_embedding_batch(TEXTS), expected)
        if make is llama_ollama:
            assert_same_vectors([embedding.get_query_embedding(TEXTS[0])], expected[:1])


@pytest.mark.parametrize("provider", ["cohere", "jina_ai", "hosted_vllm"])
def test_litellm_reranks_by_any_of_its_providers(server: Server, provider: str) -> None:
    litellm = pytest.importorskip("litellm", reason=COMES_WITH)
    ranked = litellm.rerank(
        model=f"{provider}/{MODEL}",
        query=QUERY,
        documents=TEXTS,
        top_n=3,
        api_key=server.key,
        api_base=f"{server.url}/v1" if provider == "hosted_vllm" else server.url,
    )
    assert_best_first(
        [one["index"] for one in ranked.results],
        [one["relevance_score"] for one in ranked.results],
    )
