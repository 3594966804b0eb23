# ruff: noqa: E402 - what is imported below needs what is asked for above it
"""Rerank over HTTP, beside what transformers says of the same pairs: template, cut, head, sigmoid."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the reference runs on torch")
transformers = pytest.importorskip("transformers", reason="the reference is transformers")

from tests.api.house import READY
from tests.support.dummy.tokenizer import SENTENCES, write_tokenizer
from tokenizers import Tokenizer as Codec

from trivec.build import Models, ServerParts, load_models, open_server_parts
from trivec.settings import load_settings

pytestmark = pytest.mark.reference

VOCABULARY_SIZE, POSITIONS = 2000, 1500
CONFIG = {
    "vocab_size": VOCABULARY_SIZE,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": POSITIONS,
    "initializer_range": 0.2,
    "num_labels": 1,
}
XLM = CONFIG | {"type_vocab_size": 1, "pad_token_id": 1, "layer_norm_eps": 1e-5}
CLASSES = {
    "bert": ("BertForSequenceClassification", CONFIG),
    "xlm-roberta": ("XLMRobertaForSequenceClassification", XLM),
}
LINES = SENTENCES.strip().splitlines()
QUERY = LINES[0]
DOCUMENTS = [LINES[1], "a", *(" ".join(LINES[: 3 * n]) for n in (1, 2, 4))]


@pytest.fixture(params=CLASSES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def reranker(family: str, tmp_path: Path) -> Any:
    """A seeded model of transformers, saved by it to the test's folder, with a tokenizer."""
    name, config = CLASSES[family]
    torch.manual_seed(5)
    kind = getattr(transformers, name)
    model = kind(kind.config_class(**config)).eval()
    model.save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "tokenizer.json"
    write_tokenizer(file, family=family, vocabulary_size=VOCABULARY_SIZE)
    return model


@pytest.fixture
def parts(tmp_path: Path) -> Iterator[ServerParts]:
    settings = load_settings(
        {
            "models": [f"reranker={tmp_path / 'model'}"],
            "precision": "fp32",
            "backend": "openvino",
            "data_dir": str(tmp_path),
            "no_auth": True,
        },
        {},
    )
    opened = open_server_parts(settings)
    opened.accounts.start()
    yield opened
    opened.close()


@pytest.fixture
def models(reranker: Any, parts: ServerParts) -> Models:
    return load_models(parts.settings, parts, cores=1)


def logits_there(model: Any, folder: Path, long: str) -> list[float]:
    """Of each document, and of *long* with as much of it as fits."""
    codec = Codec.from_file(str(folder / "tokenizer.json"))
    found = []
    for document in [*DOCUMENTS, long]:
        if document is long:
            room = POSITIONS - (2 if model.config.model_type == "xlm-roberta" else 0)
            codec.enable_truncation(room, strategy="only_second")
        encoding = codec.encode(QUERY, document)
        inputs = {"input_ids": torch.tensor([encoding.ids])}
        if model.config.type_vocab_size > 1:
            inputs["token_type_ids"] = torch.tensor([encoding.type_ids])
        with torch.inference_mode():
            found.append(float(model(**inputs).logits[0, 0]))
    return found


async def test_scores_over_http_equal_transformers(
    reranker: Any, parts: ServerParts, models: Models, tmp_path: Path
) -> None:
    long = " ".join(LINES * 40)
    expected = logits_there(reranker, tmp_path / "model", long)
    app = parts.app(models.embedders, lambda: READY)
    models.workers.start()
    try:
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://test"
        ) as client:
            body: dict[str, object] = {"model": "reranker", "query": QUERY, "truncate": True}
            body |= {"documents": [*DOCUMENTS, long], "return_documents": False}
            raw = (await client.post("/v1/rerank", json=body | {"raw_scores": True})).json()
            usual = (await client.post("/v1/rerank", json=body)).json()
    finally:
        await models.workers.stop(0)
    logits = {one["index"]: one["relevance_score"] for one in raw["results"]}
    found = [logits[i] for i in range(len(expected))]
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)
    assert np.ptp(found) > 0.01, "the documents are told apart"
    scores = {one["index"]: one["relevance_score"] for one in usual["results"]}
    sigmoid = 1 / (1 + np.exp(-np.array(expected)))
    np.testing.assert_allclose([scores[i] for i in range(len(expected))], sigmoid, atol=1e-4)
    [cut] = [one for one in usual["results"] if "truncated" in one]
    assert cut["index"] == len(DOCUMENTS)
