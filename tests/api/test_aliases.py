"""`--alias NAME=ID`: a served model under a name of the operator's, with the same keys and bill."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.api.house import READY, Heard
from tests.checkpoints.tiny import write_tiny
from tests.support.memory_store import MemoryStore

from trivec.accounts import Accounts, KeyPlan
from trivec.api import build_app
from trivec.build import Models, load_models, open_server_parts
from trivec.core.clock import SystemClock
from trivec.core.errors import SettingInvalid
from trivec.settings import HttpLimits, load_settings

ALIAS = "text-embedding-3-small"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("aliases") / "model")


def load(folder: Path, data_dir: Path, *aliases: str) -> Models:
    """Two models of the same files, "one" and "two", on a fake device."""
    flags = {
        "models": [f"one={folder}", f"two={folder}"],
        "aliases": list(aliases),
        "backend": "fake",
        "data_dir": str(data_dir),
    }
    settings = load_settings(flags, {})
    parts = open_server_parts(settings)
    return load_models(settings, parts, cores=1)


class Service:
    """Two models, the second with an alias, behind the API."""

    def __init__(self, models: Models) -> None:
        self.store = MemoryStore()
        self.accounts = Accounts(self.store, clock=SystemClock(), secret=b"s" * 32)
        self.accounts.start()
        self.app = build_app(
            embedders=models.embedders,
            accounts=self.accounts,
            observer=Heard(),
            clock=SystemClock(),
            limits=HttpLimits(),
            health=lambda: READY,
            metrics=None,
            metrics_open=False,
        )

    async def client(self, *models: str) -> httpx.AsyncClient:
        """With a key for *models* alone, or for all."""
        plan = KeyPlan(f"key of {models}", models=frozenset(models) or None)
        return httpx.AsyncClient(
            transport=httpx.ASGITransport(self.app),
            base_url="http://test/v1",
            headers={"authorization": f"Bearer {(await self.accounts.create_key(plan)).plain}"},
        )


@pytest.fixture
async def service(folder: Path, tmp_path: Path) -> AsyncIterator[Service]:
    models = load(folder, tmp_path, f"{ALIAS}=two")
    models.workers.start()
    service = Service(models)
    yield service
    service.accounts.stop()
    await models.workers.stop(0)


def body(model: str) -> dict[str, Any]:
    return {"model": model, "input": "a text"}


async def test_an_alias_is_answered_under_its_own_name_and_billed_by_the_models_id(
    service: Service,
) -> None:
    async with await service.client() as client:
        by_alias = (await client.post("/embeddings", json=body(ALIAS))).json()
        by_id = (await client.post("/embeddings", json=body("two"))).json()
        listed = (await client.get("/models")).json()["data"]
    assert by_alias == by_id | {"model": ALIAS}
    assert [row.model for row in service.store.rows] == ["two", "two"]
    assert {model["id"]: model["aliases"] for model in listed} == {"one": [], "two": [ALIAS]}


@pytest.mark.parametrize("named", ["two", ALIAS])
async def test_a_key_for_the_model_by_either_name_may_use_both(
    service: Service, named: str
) -> None:
    async with await service.client(named) as client:
        answers = [await client.post("/embeddings", json=body(name)) for name in ("two", ALIAS)]
        other = await client.post("/embeddings", json=body("one"))
    assert [answer.status_code for answer in answers] == [200, 200]
    assert other.status_code == 403


async def test_a_key_for_another_model_may_not_use_the_alias(service: Service) -> None:
    async with await service.client("one") as client:
        answer = await client.post("/embeddings", json=body(ALIAS))
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "model_access_denied")


@pytest.mark.parametrize(
    ("alias", "message"),
    [
        pytest.param("x=three", "alias x=three is of a model that is not served", id="of-nothing"),
        pytest.param("one=two", "two models are called one", id="the-name-of-another-model"),
    ],
)
def test_an_alias_that_cannot_be_stops_the_start(
    folder: Path, tmp_path: Path, alias: str, message: str
) -> None:
    with pytest.raises(SettingInvalid, match=message):
        load(folder, tmp_path, alias)


def test_an_alias_may_be_of_an_alias(folder: Path, tmp_path: Path) -> None:
    models = load(folder, tmp_path, "x=one", "y=x")
    assert models.embedders["y"] is models.embedders["one"]
