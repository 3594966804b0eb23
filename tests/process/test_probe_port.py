"""Probes have a port of their own, which clients of the main one cannot exhaust."""

import resource
import socket
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from tests.process.server import running

pytestmark = pytest.mark.process

CONNECTIONS_MAX = 4


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port


@pytest.mark.parametrize("api_processes", [1, 2])
def test_probes_are_answered_while_half_sent_heads_hold_every_connection(
    tmp_path: Path, api_processes: int
) -> None:
    port = free_port()
    environ = {
        "TRIVEC_HTTP__CONNECTIONS_MAX": str(CONNECTIONS_MAX),
        "TRIVEC_API_PROCESSES": str(api_processes),
    }
    options = ("--backend", "fake", "--probe-port", str(port))
    with running(tmp_path, *options, environ=environ) as server, ExitStack() as held:
        main = urlsplit(server.url)
        for _ in range(4 * CONNECTIONS_MAX * api_processes):
            one = socket.create_connection((main.hostname or "", main.port or 0), timeout=60)
            held.enter_context(one)
            one.sendall(b"GET /livez HTTP/1.1\r\nHost: half")
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as probe:
            for path in ("/livez", "/readyz", "/health"):
                assert probe.get(path).status_code == 200
            assert probe.get("/metrics").status_code == 401, "as on the main port"
            assert probe.get("/v1/models").status_code == 404


def test_a_probe_port_in_use_is_one_line(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with running(tmp_path, "--backend", "fake", "--probe-port", str(port)) as server:
            assert server.exit_code() == 2
    assert any("Choose another --probe-port." in line for line in server.said)


def test_the_server_may_open_as_many_files_as_it_is_allowed(tmp_path: Path) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with running(tmp_path, "--backend", "fake") as server:
        assert server.url
        limits = Path(f"/proc/{server.process.pid}/limits").read_text()
    (files,) = [line.split() for line in limits.splitlines() if line.startswith("Max open files")]
    assert files[3] == files[4] == (str(hard) if hard >= 0 else "unlimited")
