"""Vector stores that embed through an OpenAI client, or that take what we return."""

import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import openai
import pytest
from tests.api.house import CARD, House, StandIn
from tests.process.server import Server

COMES_WITH = "comes with: make test-clients"
PASSAGES = ["the red house by the sea", "green hills", "a bus that was late"]


@pytest.fixture
def hybrid_house() -> Iterator[House]:
    """A model of BGE-M3's shape: dense and sparse from one pass."""
    house = House(model=StandIn(replace(CARD, token_count_max=256)))
    yield house
    house.close()


def test_chroma_embeds_what_it_stores_and_what_it_is_asked(
    base_url: str, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    chromadb = pytest.importorskip("chromadb", reason=COMES_WITH)
    functions = pytest.importorskip("chromadb.utils.embedding_functions", reason=COMES_WITH)
    monkeypatch.setenv("OPENAI_API_KEY", server.key)
    embed = functions.OpenAIEmbeddingFunction(model_name="all-minilm-l6-v2", api_base=base_url)
    store = chromadb.EphemeralClient(chromadb.Settings(anonymized_telemetry=False))
    collection = store.create_collection("cats", embedding_function=embed)
    try:
        collection.add(
            ids=["cat", "rates"], documents=["A cat sits on the mat.", "Interest rates rose again."]
        )
        found = collection.query(query_texts=["On the mat there is a cat."], n_results=1)
    finally:
        store.delete_collection("cats")
        embed.client.close()
    assert found["ids"] == [["cat"]]


def test_qdrant_fuses_our_dense_and_sparse_vectors(hybrid_house: House) -> None:
    with warnings.catch_warnings():  # importing protobuf's compiled part warns about itself
        warnings.simplefilter("ignore", DeprecationWarning)
        qdrant = pytest.importorskip("qdrant_client", reason=COMES_WITH)
    models = qdrant.models

    def sparse_vector(ours: dict[str, Any]) -> Any:
        return models.SparseVector(indices=ours["indices"], values=ours["values"])

    with (
        hybrid_house.listening() as address,
        openai.OpenAI(base_url=f"{address}/v1", api_key=hybrid_house.key) as client,
    ):
        answer = client.embeddings.create(
            model=CARD.id,
            input=[PASSAGES[0], *PASSAGES],
            encoding_format="float",
            extra_body={"output_type": "dense&sparse"},
        )
    query, *rows = (row.model_dump() for row in answer.data)
    store = qdrant.QdrantClient(":memory:")
    store.create_collection(
        "passages",
        vectors_config={
            "dense": models.VectorParams(size=CARD.dimensions, distance=models.Distance.COSINE)
        },
        sparse_vectors_config={"sparse": models.SparseVectorParams()},
    )
    store.upsert(
        "passages",
        [
            models.PointStruct(
                id=i,
                vector={
                    "dense": row["embedding"],
                    "sparse": sparse_vector(row["sparse_embedding"]),
                },
            )
            for i, row in enumerate(rows)
        ],
    )
    sparse_query = sparse_vector(query["sparse_embedding"])
    found = store.query_points(
        "passages",
        prefetch=[
            models.Prefetch(query=query["embedding"], using="dense", limit=3),
            models.Prefetch(query=sparse_query, using="sparse", limit=3),
        ],
        query=models.FusionQuery(fusion=models.Fusion.RRF),
    )
    store.close()
    assert found.points[0].id == 0, "the passage itself comes first by both"
    assert len(found.points) == len(PASSAGES)
