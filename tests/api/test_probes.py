"""Probes and the metrics page say what others found out, and compute nothing."""

import threading

import pytest
from tests.api.house import MODEL, House

from trivec.core.health import Health

FINE = Health("ready", alive=True, ready=True, reason="ok")
SICK = Health("ready", alive=False, ready=False, reason="a worker is past its heartbeat bound")
LOADING = Health("loading", alive=True, ready=False, reason="baai/bge-m3 is loading")


@pytest.mark.parametrize(
    ("health", "live", "ready"),
    [
        pytest.param(FINE, 200, 200, id="fine"),
        pytest.param(SICK, 503, 503, id="sick"),
        pytest.param(LOADING, 200, 503, id="loading"),
    ],
)
async def test_probes_say_how_it_is_and_why(
    house: House, health: Health, live: int, ready: int
) -> None:
    house.health = health
    async with house.client("no key at all") as client:
        for path, status in (("livez", live), ("readyz", ready), ("health", ready)):
            response = await client.get(f"http://house/{path}")
            assert response.status_code == status
            assert response.json() == {
                "status": "ok" if status == 200 else "unavailable",
                "phase": health.phase,
                "reason": health.reason,
            }
            assert response.headers["cache-control"] == "no-store"
    assert not house.model.embedded


async def test_the_metrics_page_is_prometheus_text_for_an_admin(house: House) -> None:
    async with house.client() as client:
        response = await client.get("http://house/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert response.text == "trivec_up 1\n"


async def test_the_metrics_page_is_printed_off_the_event_loop(house: House) -> None:
    printed_by = list[int]()

    def page() -> bytes:
        printed_by.append(threading.get_ident())
        return b""

    house.serve(metrics=page)
    async with house.client() as client:
        await client.get("http://house/metrics")
    assert len(printed_by) == 1
    assert printed_by[0] != threading.get_ident()


async def test_open_metrics_need_no_key(house: House) -> None:
    house.serve(metrics_open=True)
    async with house.client("none") as client:
        assert (await client.get("http://house/metrics")).status_code == 200


async def test_without_metrics_there_is_no_page(house: House) -> None:
    house.serve(metrics=None)
    async with house.client() as client:
        assert (await client.get("http://house/metrics")).status_code == 404


async def test_head_is_get_without_the_body(house: House) -> None:
    async with house.client() as client:
        whole = await client.get("/models")
        head = await client.head("/models")
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == whole.headers["content-length"]


async def test_keyed_routes_answer_while_the_process_drains(house: House) -> None:
    house.health = Health("draining", alive=True, ready=False, reason="SIGTERM")
    async with house.client() as client:
        response = await client.post("/embeddings", json={"model": MODEL, "input": "a"})
    assert (response.status_code, response.headers["connection"]) == (200, "close")
