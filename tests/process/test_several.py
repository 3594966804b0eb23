"""Several API processes before one engine process: real ones, ready, killed one by one, drained."""

import json
import os
import re
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from tests.process.server import Server, refused, running, started
from tests.process.test_life import SlowClient

from trivec.server.processes import RESTARTS_MAX

pytestmark = pytest.mark.process

PROBES = 48  # of which one of three processes is missed once in 3e8 times
THREE = {"TRIVEC_API_PROCESSES": "3", "TRIVEC_LIFE__DRAIN_GRACE_S": "0"}
FAKE = ("--backend", "fake")
JSON = {"Content-Type": "application/json"}
MODEL = "all-minilm-l6-v2"


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(tmp_path_factory.mktemp("several"), *FAKE, environ=THREE) as server:
        yield server


def ask(server: Server, *texts: str) -> httpx.Response:
    """One request on a connection of its own, so that any process may get it."""
    headers = {**JSON, "Authorization": f"Bearer {server.key}"}
    body = json.dumps({"model": MODEL, "input": list(texts)}).encode()
    return httpx.post(f"{server.url}/v1/embeddings", content=body, headers=headers, timeout=60)


def members(server: Server) -> dict[str, int]:
    """The process ids: the engine's is the first that was started."""
    me = server.process.pid
    children = Path(f"/proc/{me}/task/{me}/children").read_text().split()
    names = ["engine", "api-1", "api-2", "api-3"]
    return dict(zip(names, map(int, children), strict=False))


def ready(server: Server) -> tuple[int, str]:
    answer = httpx.get(f"{server.url}/readyz", timeout=60)
    return answer.status_code, answer.json()["reason"]


def test_every_process_gives_a_text_the_same_vector(several: Server) -> None:
    answers = [ask(several, "Hello, world", f"text {i}") for i in range(24)]
    assert {answer.status_code for answer in answers} == {200}
    vectors = {json.dumps(answer.json()["data"][0]["embedding"]) for answer in answers}
    assert len(vectors) == 1
    assert len({json.dumps(answer.json()["data"][1]["embedding"]) for answer in answers}) == 24
    served = {
        match[1] for line in several.said if (match := re.search(r'"process":"(api-\d)"', line))
    }
    assert served == {"api-1", "api-2", "api-3"}


def until(what: Callable[[], bool], *, within_s: float = 60.0) -> bool:
    """Whether *what* comes true in time; looks again and again."""
    pause = threading.Event()
    deadline_s = time.monotonic() + within_s
    while not (true := what()) and time.monotonic() < deadline_s:
        pause.wait(0.05)
    return true


def test_the_ledger_and_the_metrics_of_all_processes_are_one(tmp_path: Path) -> None:
    with running(tmp_path, *FAKE, environ=THREE) as server:
        tokens = sum(ask(server, f"text {i}").json()["usage"]["total_tokens"] for i in range(12))
        with server.client() as client:
            usage = client.get("/admin/v1/usage", params={"by": "key"}).json()["data"]
            assert (usage[0]["requests"], usage[0]["tokens"]) == (12, tokens)

            def answered() -> dict[str, float]:
                page = client.get("/metrics").text
                return {
                    one.labels["process"]: one.value
                    for family in text_string_to_metric_families(page)
                    for one in family.samples
                    if one.name == "trivec_requests_total" and one.labels["route"] == "/embeddings"
                }

            assert until(lambda: sum(answered().values()) == 12), answered()
            assert set(answered()) <= {"api-1", "api-2", "api-3"}

            def signals() -> dict[str, list[float]]:
                page = client.get("/metrics").text
                return {
                    family.name: [one.value for one in family.samples]
                    for family in text_string_to_metric_families(page)
                    if family.name
                    in ("trivec_queue_seconds", "trivec_queue_tokens", "trivec_tokens_per_second")
                }

            assert until(lambda: max(signals().get("trivec_tokens_per_second", [0])) > 0)
            assert len(signals()["trivec_tokens_per_second"]) == 1, "the engine process's alone"
            assert signals()["trivec_queue_seconds"] == [0]
            assert signals()["trivec_queue_tokens"] == [0]


def test_without_its_engine_nobody_is_ready_until_it_is_back(tmp_path: Path) -> None:
    with running(tmp_path, *FAKE, environ=THREE) as server:
        before = ask(server, "Hello, world").json()["data"]
        engine = members(server)["engine"]
        server.signal(signal.SIGSTOP)  # so that it is not started again at once
        os.kill(engine, signal.SIGKILL)
        assert until(lambda: all(ready(server)[0] == 503 for _ in range(PROBES)))
        assert "the engine process is away" in ready(server)[1]
        refused_answer = ask(server, "Hello, world")
        assert refused_answer.status_code == 503
        assert int(refused_answer.headers["retry-after"]) >= 1
        server.signal(signal.SIGCONT)
        server.wait_until_it_says("The engine process ended with 137; it is started again")
        assert until(lambda: all(ready(server) == (200, "ok") for _ in range(PROBES)))
        assert ask(server, "Hello, world").json()["data"] == before


def test_a_lost_device_answers_503_everywhere_and_ends_in_another_engine_process(
    tmp_path: Path,
) -> None:
    program = str(Path(__file__).with_name("losing.py"))
    with started([sys.executable, program, str(tmp_path), "3"]) as server:
        url = server.url
        lost = ask(server, "lost")
        assert lost.status_code == 503
        assert int(lost.headers["retry-after"]) >= 1
        server.wait_until_it_says('"reason":"slot 0: the driver says goodbye"')
        server.wait_until_it_says("The engine process ended with 70; it is started again")
        server.wait_until_it_says("the engine process is gone", times=3)
        assert until(lambda: all(ready(server)[0] == 200 for _ in range(PROBES)))
        assert ask(server, "Hello, world").status_code == 200
        assert server.url == url


@pytest.mark.parametrize("name", ["engine", "api-2"])
def test_a_process_that_dies_is_back_and_the_others_never_went(tmp_path: Path, name: str) -> None:
    with running(tmp_path, *FAKE, environ=THREE) as server:
        url = server.url
        before = members(server)
        os.kill(before[name], signal.SIGKILL)
        server.wait_until_it_says(f"The {name} process ended with 137; it is started again")
        if name == "engine":
            server.wait_until_it_says("the engine process is gone", times=3)
        assert until(lambda: all(ready(server)[0] == 200 for _ in range(PROBES)))
        assert {ask(server, "Hello, world").status_code for _ in range(12)} == {200}
        assert url == server.url
        me = server.process.pid
        after = set(map(int, Path(f"/proc/{me}/task/{me}/children").read_text().split()))
        assert set(before.values()) - after == {before[name]}


def test_asked_to_stop_it_finishes_what_every_process_has_accepted(tmp_path: Path) -> None:
    with running(tmp_path, *FAKE, environ=THREE) as server:
        clients = [SlowClient(server) for _ in range(9)]
        server.signal(signal.SIGTERM)
        server.wait_until_it_says('"phase":"draining"', times=3)
        assert {client.finish()[:13] for client in clients} == {"HTTP/1.1 200 "}
        assert server.exit_code() == 0
        stopped = [line for line in server.said if '"phase":"stopped"' in line]
        assert '"process":"engine"' in stopped[-1], "the engine process is the last to go"


def test_when_the_parent_is_killed_everybody_goes_with_it(tmp_path: Path) -> None:
    with running(tmp_path, *FAKE, environ=THREE) as server:
        assert ready(server)[0] == 200
        watched = [os.pidfd_open(pid) for pid in members(server).values()]
        server.process.kill()
        for child in watched:
            gone, _, _ = select.select([child], [], [], 60)
            os.close(child)
            assert gone, "a process outlived its parent"


def test_a_model_that_cannot_be_had_stops_everybody_with_one_sentence(tmp_path: Path) -> None:
    missing = tmp_path / "none"
    with running(tmp_path, "--model", str(missing), environ=THREE) as server:
        assert server.exit_code() == 2
        said = [line for line in server.said if line.startswith("trivec: ")]
        assert len(said) == 1
        assert str(missing) in said[0]


def test_a_port_that_somebody_else_would_share_is_refused() -> None:
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        assert f"cannot listen on 127.0.0.1:{port}" in refused("--port", port, environ=THREE)


def test_a_process_that_dies_again_and_again_ends_the_service(tmp_path: Path) -> None:
    with running(tmp_path, *FAKE, environ=THREE) as server:
        assert ready(server)[0] == 200
        for restarts in range(RESTARTS_MAX + 1):
            assert until(lambda: len(members(server)) == 4)
            os.kill(members(server)["api-3"], signal.SIGKILL)
            server.wait_until_it_says("The api-3 process ended with 137", times=restarts + 1)
        assert server.exit_code() == 70


def test_a_first_key_is_said_before_all_processes_are_ready(tmp_path: Path) -> None:
    with running(tmp_path, *FAKE, environ=THREE) as server:
        key = server.key
        server.wait_until_it_says("is ready")
        # By place in the text: four processes write to one stderr, where lines may run together.
        said = "\n".join(server.said)
        assert key not in said
        assert said.index("first-key") < said.index("is ready.")


def test_a_folder_too_deep_for_a_socket_is_refused(tmp_path: Path) -> None:
    deep = tmp_path / ("x" * 100)
    deep.mkdir()
    said = refused("--port", "0", environ={**THREE, "TMPDIR": str(deep)})
    assert f"cannot make a socket at {deep}" in said
    assert "Set TMPDIR" in said
