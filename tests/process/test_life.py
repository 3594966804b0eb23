"""A real server from start to end: ready, draining, asked twice, its device lost."""

import contextlib
import json
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import httpx
import pytest
from tests.process.server import Server, running, started

pytestmark = pytest.mark.process

NO_GRACE = {"TRIVEC_LIFE__DRAIN_GRACE_S": "0"}
FAKE = ("--backend", "fake")
JSON = {"Content-Type": "application/json"}
BODY = json.dumps({"model": "all-minilm-l6-v2", "input": "Hello, world"}).encode()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with running(tmp_path, *FAKE, environ=NO_GRACE) as started:
        yield started


class SlowClient:
    """A connection whose request is under way until `finish` sends the last byte of its body."""

    def __init__(self, server: Server) -> None:
        url = httpx.URL(server.url)
        self._socket = socket.create_connection((url.host, url.port or 0), timeout=60)
        head = (
            f"POST /v1/embeddings HTTP/1.1\r\nHost: {url.host}\r\n"
            f"Authorization: Bearer {server.key}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(BODY)}\r\nExpect: 100-continue\r\n\r\n"
        )
        self._socket.sendall(head.encode())
        assert b"100" in self._socket.recv(4096)  # the app is reading the body by now
        self._socket.sendall(BODY[:-1])

    def finish(self) -> str:
        """Send the rest and read the whole answer."""
        self._socket.sendall(BODY[-1:])
        return self.read()

    def read(self) -> str:
        with closing(self._socket):
            answer = b""
            while piece := self._socket.recv(65536):
                answer += piece
        return answer.decode()


def test_the_line_it_prints_works_as_pasted(server: Server) -> None:
    curl = server.wait_until_it_says(r"^  (curl .*)$")[1]
    answer = subprocess.run(["sh", "-c", curl], capture_output=True, text=True, check=True)
    assert len(json.loads(answer.stdout)["data"][0]["embedding"]) == 384


def test_asked_to_stop_it_finishes_what_it_has_accepted(server: Server) -> None:
    client = SlowClient(server)
    server.signal(signal.SIGTERM)
    server.wait_until_it_says('"phase":"draining"')
    answer = client.finish()
    assert answer.startswith("HTTP/1.1 200 ")
    assert "connection: close" in answer.lower()
    assert server.exit_code() == 0


def test_ctrl_c_is_the_same_request(server: Server) -> None:
    client = SlowClient(server)
    server.signal(signal.SIGINT)
    server.wait_until_it_says('"phase":"draining"')
    assert client.finish().startswith("HTTP/1.1 200 ")
    assert server.exit_code() == 0


def test_while_it_lingers_it_answers_but_is_not_ready(tmp_path: Path) -> None:
    with running(tmp_path, *FAKE, environ={"TRIVEC_LIFE__DRAIN_GRACE_S": "600"}) as server:
        with server.client() as client:
            assert client.get("/readyz").json()["status"] == "ok"
            server.signal(signal.SIGTERM)
            server.wait_until_it_says('"phase":"draining"')
            ready = client.get("/readyz")
            assert ready.status_code == 503
            assert ready.headers["connection"] == "close"
            assert client.get("/livez").status_code == 200
            embedded = client.post("/v1/embeddings", content=BODY, headers=JSON)
            assert embedded.status_code == 200
            assert embedded.headers["connection"] == "close"
        server.ask_again()
        assert server.exit_code() == 0


def test_asked_twice_it_answers_the_rest_503_and_leaves(server: Server) -> None:
    client = SlowClient(server)
    server.signal(signal.SIGTERM)
    server.wait_until_it_says('"phase":"draining"')
    server.ask_again()
    answer = client.read()
    assert answer.startswith("HTTP/1.1 503 ")
    assert '"draining"' in answer
    assert server.exit_code() == 0


def test_asked_while_it_loads_it_leaves_at_once(tmp_path: Path) -> None:
    with running(tmp_path) as server:
        server.wait_until_it_says('"phase":"loading"')
        server.signal(signal.SIGTERM)
        assert server.exit_code() == 0


def test_a_lost_device_answers_503_and_ends_with_70_and_one_line(tmp_path: Path) -> None:
    program = str(Path(__file__).with_name("losing.py"))
    with started([sys.executable, program, str(tmp_path), "1"]) as server:
        url, headers = server.url, {**JSON, "Authorization": f"Bearer {server.key}"}
        lost = json.dumps({"model": "all-minilm-l6-v2", "input": "lost"})
        answer = httpx.post(f"{url}/v1/embeddings", content=lost, headers=headers, timeout=60)
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) >= 1
        assert server.exit_code() == 70
        last = [line for line in server.said if "cannot go on" in line]
        assert len(last) == 1
        assert "the driver says goodbye" in last[0]


def make_certificate(folder: Path) -> tuple[Path, Path]:
    cert, key = folder / "cert.pem", folder / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
         "-nodes", "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1",
         "-days", "2", "-keyout", str(key), "-out", str(cert)],
        check=True,
        capture_output=True,
    )  # fmt: skip
    return cert, key


def test_sighup_takes_a_new_certificate_and_nothing_else(tmp_path: Path) -> None:
    cert, key = make_certificate(tmp_path)
    tls = ("--tls-cert", str(cert), "--tls-key", str(key))
    with running(tmp_path, *FAKE, *tls, environ=NO_GRACE) as server:
        assert server.url.startswith("https://")
        first = ssl.create_default_context(cafile=cert)
        with httpx.Client(base_url=server.url, verify=first, timeout=60) as before:
            assert before.get("/readyz").status_code == 200
            make_certificate(tmp_path)
            second = ssl.create_default_context(cafile=cert)
            server.signal(signal.SIGHUP)
            server.wait_until_it_says("the certificate was read again")
            assert httpx.get(f"{server.url}/readyz", verify=second, timeout=60).status_code == 200
            with pytest.raises(httpx.ConnectError):
                httpx.get(f"{server.url}/readyz", verify=first, timeout=60)
        key.write_text("no key")
        server.signal(signal.SIGHUP)
        server.wait_until_it_says("the certificate is still the old one")
        assert httpx.get(f"{server.url}/readyz", verify=second, timeout=60).status_code == 200
        server.signal(signal.SIGTERM)
        assert server.exit_code() == 0


def test_signals_that_mean_nothing_here_kill_nothing(tmp_path: Path) -> None:
    with running(tmp_path, *FAKE, environ=NO_GRACE) as server:
        server.wait_until_it_says("is ready")
        server.signal(signal.SIGHUP)
        server.wait_until_it_says("SIGHUP is ignored")
        for number in (signal.SIGUSR1, signal.SIGUSR2):
            server.signal(number)
            server.wait_until_it_says(f"{number.name} is ignored")
        assert httpx.get(f"{server.url}/readyz", timeout=60).status_code == 200
        server.signal(signal.SIGQUIT)
        assert server.exit_code() == 0
        server.wait_until_it_says("draining: asked to stop")


GRACE_WITHOUT_END = {"TRIVEC_LIFE__DRAIN_GRACE_S": "3600"}


def test_ctrl_c_leaves_at_once_where_no_request_is_in_flight(tmp_path: Path) -> None:
    with running(tmp_path, *FAKE, environ=GRACE_WITHOUT_END) as server:
        server.wait_until_it_says("is ready")
        server.signal(signal.SIGINT)
        assert server.exit_code() == 0


def test_a_second_ctrl_c_leaves_with_a_request_in_flight(tmp_path: Path) -> None:
    with running(tmp_path, *FAKE, environ=GRACE_WITHOUT_END) as server:
        client = SlowClient(server)
        for _ in range(600):  # one too close to the first counts as its echo
            server.signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.process.wait(0.1)
                break
        assert server.exit_code() == 130
        assert client.read() == ""


def test_a_server_that_is_killed_leaves_its_port_to_the_next(tmp_path: Path) -> None:
    with running(tmp_path, *FAKE) as server:
        port, key = str(httpx.URL(server.url).port), server.key
        server.process.kill()
        assert -server.exit_code() == signal.SIGKILL
    with running(tmp_path, *FAKE, "--port", port) as server:
        headers = {**JSON, "Authorization": f"Bearer {key}"}
        url = f"{server.url}/v1/embeddings"
        assert httpx.post(url, content=BODY, headers=headers, timeout=60).status_code == 200


def test_the_first_key_is_shown_only_once(tmp_path: Path) -> None:
    with running(tmp_path, *FAKE, environ=NO_GRACE) as server:
        key = server.key
        server.signal(signal.SIGTERM)
        assert server.exit_code() == 0
        assert key not in "\n".join(server.said)
        assert (tmp_path / "first-key").stat().st_mode & 0o777 == 0o600
    with running(tmp_path, *FAKE, environ=NO_GRACE) as server:
        url = server.url
        assert key not in "\n".join(server.said)
        models = httpx.get(
            f"{url}/v1/models", headers={"Authorization": f"Bearer {key}"}, timeout=60
        )
        assert models.status_code == 200
