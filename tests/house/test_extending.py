"""The house is open: what is added in one file is served, and nothing in `src` is touched."""

from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest
from tests.support import toy_model
from tests.support.toy_store import ToyStore

from trivec.accounts import Accounts, KeyPlan
from trivec.build import load_models, open_server_parts
from trivec.core.health import Health
from trivec.core.types import LongText, Output
from trivec.settings import load_settings


@pytest.mark.parametrize("precision", ["fp32", "int8"])
async def test_a_family_in_one_file_is_loaded_and_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    toy_model.register(monkeypatch)
    folder = toy_model.write_checkpoint(tmp_path / "toy")
    settings = load_settings(
        {"models": [f"toy={folder}"], "precision": precision, "data_dir": str(tmp_path)}, {}
    )
    parts = open_server_parts(settings)
    models = load_models(settings, parts, cores=1)
    models.workers.start()
    try:
        engine = models.embedders["toy"]
        sequences = await engine.tokenizer.tokenize(
            ["w1 w2 w3", "w4", "w1 w2 w3"], long_text=LongText.REFUSE
        )
        vectors = (await engine.embed(sequences, Output.DENSE)).vectors.dense
    finally:
        await models.workers.stop(0)
    assert vectors.shape == (3, 48)
    np.testing.assert_array_equal(vectors[0], vectors[2])
    assert not np.allclose(vectors[0], vectors[1], atol=0.01)


async def test_a_store_in_one_file_is_handed_to_a_server_and_keeps_its_ledger(
    tmp_path: Path,
) -> None:
    ledger = tmp_path / "ledger.txt"
    settings = load_settings({"backend": "fake", "no_auth": True, "data_dir": str(tmp_path)}, {})
    parts = open_server_parts(settings)
    accounts = Accounts(ToyStore(ledger), clock=parts.clock, secret=b"s" * 32)
    parts = replace(parts, accounts=accounts)
    models = load_models(settings, parts, cores=1)
    accounts.start()
    models.workers.start()
    try:
        new = await accounts.create_key(KeyPlan("toy"))
        app = parts.app(models.embedders, lambda: Health("ready", True, True, "ok"))
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app),
            base_url="http://test",
            headers={"Authorization": f"Bearer {new.plain}"},
        ) as client:
            body = {"model": models.cards[0].id, "input": "one two"}
            answer = await client.post("/v1/embeddings", json=body)
    finally:
        await models.workers.stop(0)
        accounts.stop()
    tokens = answer.json()["usage"]["total_tokens"]
    assert ledger.read_text() == f"{new.key.id} {models.cards[0].id} {tokens}\n"
