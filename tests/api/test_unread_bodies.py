"""An early refusal of a large body arrives: the rest of the body is read and dropped, within bounds."""

import asyncio
import http.client
import json
import shutil
import socket
import subprocess

import httpx
import pytest
from starlette.types import Message
from tests.api.house import House

from trivec.settings import HttpLimits

MEGABYTE = 1_000_000
TIMES = 4  # in a row, on one connection where it is kept

REFUSALS = [
    pytest.param("POST", "/v1/embeddings", {"authorization": "Bearer wrong"}, 7, 401, id="key"),
    pytest.param("POST", "/v1/embeddings", {}, 9, 413, id="too-large"),
    pytest.param("POST", "/nowhere", {}, 7, 404, id="path"),
    pytest.param("PUT", "/v1/embeddings", {}, 7, 405, id="method"),
    pytest.param("POST", "/v1/embeddings", {"content-type": "text/plain"}, 7, 415, id="type"),
]


@pytest.mark.parametrize(("method", "path", "headers", "megabytes", "status"), REFUSALS)
def test_a_client_that_sends_all_before_it_reads_gets_the_refusal(
    shared_house: House,
    address: str,
    method: str,
    path: str,
    headers: dict[str, str],
    megabytes: int,
    status: int,
) -> None:
    url = httpx.URL(address)
    said = {"authorization": f"Bearer {shared_house.key}", "content-type": "application/json"}
    client = http.client.HTTPConnection(url.host, url.port, timeout=30)
    for _ in range(TIMES):
        client.request(method, path, b"a" * (megabytes * MEGABYTE), said | headers)
        answer = client.getresponse()
        assert (answer.status, b'"error"' in answer.read()) == (status, True)
    client.close()


NODE = """
const statuses = []
for (const [path, megabytes] of [["/v1/embeddings", 7], ["/nowhere", 7], ["/v1/embeddings", 9]]) {
  for (let time = 0; time < 4; time++) {
    const authorization = megabytes > 8 ? process.argv[2] : "Bearer wrong"
    const headers = {authorization, "content-type": "application/json"}
    const body = "a".repeat(megabytes * 1e6)
    try {
      const answer = await fetch(process.argv[1] + path, {method: "POST", headers, body})
      await answer.text()
      statuses.push(answer.status)
    } catch (error) { statuses.push(String(error.cause ?? error)) }
  }
}
console.log(JSON.stringify(statuses))
"""


def test_nodes_fetch_gets_the_refusal(shared_house: House, address: str) -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")
    command = [node, "--input-type=module", "-e", NODE, address, f"Bearer {shared_house.key}"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(ran.stdout) == [*[401] * 4, *[404] * 4, *[413] * 4]


def test_a_client_that_waits_to_be_told_does_not_have_to_send(address: str) -> None:
    url = httpx.URL(address)
    with socket.create_connection((url.host, url.port or 80), timeout=60) as sent:
        sent.sendall(
            b"POST /v1/embeddings HTTP/1.1\r\nHost: house\r\nContent-Length: 7000000\r\n"
            b"Expect: 100-continue\r\n\r\n"
        )
        answer = b"".join(iter(lambda: sent.recv(65_536), b""))
    assert answer.startswith(b"HTTP/1.1 401 ")
    assert b"connection: close" in answer


async def test_a_client_that_sends_on_for_ever_is_cut_off(house: House) -> None:
    house.limits = HttpLimits(refused_body_bytes_max=1000)
    house.serve()
    received = 0
    sent: list[Message] = []

    async def receive() -> Message:
        nonlocal received
        received += 100
        return {"type": "http.request", "body": b"a" * 100, "more_body": True}

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/nowhere",
        "query_string": b"",
        "headers": [(b"transfer-encoding", b"chunked")],
    }
    await asyncio.wait_for(house.app(scope, receive, send), 30)
    assert (sent[0]["status"], received) == (404, 1000)
