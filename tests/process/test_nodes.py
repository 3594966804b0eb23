"""Several servers on one Postgres: one limit, one ledger, killed, cut off, and Postgres restarted."""

import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psycopg
import pytest
from pydantic import SecretStr
from tests.accounts.postgres import PostgresServer
from tests.process.server import TRIVEC, Server, started
from tests.process.test_several import until

from trivec.accounts import KeyPlan, RateLimits, UsageBy, UsageQuery
from trivec.accounts.stores import open_administration
from trivec.core.clock import SystemClock
from trivec.settings import Settings

pytestmark = pytest.mark.process

SECRET = "a secret that the nodes have in common"
LIMIT = 600
MODEL = "all-minilm-l6-v2"
SENDERS = 4  # a node


@dataclass
class Cluster:
    """Nodes over one database, and what is needed to administer it."""

    postgres: PostgresServer
    url: str
    nodes: list[Server]
    settings: Settings

    def new_key(self, name: str, limits: RateLimits) -> str:
        with open_administration(self.settings, clock=SystemClock()) as books:
            return books.create_key(KeyPlan(name, limits=limits)).plain

    def revoke(self, name: str) -> None:
        with open_administration(self.settings, clock=SystemClock()) as books:
            books.revoke_key(name)

    def rows(self, name: str) -> dict[str, int]:
        """Tokens by request id."""
        query = (
            "SELECT request_id, token_count FROM ledger JOIN keys ON keys.id = key_id "
            "WHERE name = %s"
        )
        with psycopg.connect(self.url) as connection:
            found = connection.execute(query, [name]).fetchall()
        assert len(dict(found)) == len(found)
        return dict(found)


def environ(url: str) -> dict[str, str]:
    return {
        "TRIVEC_DATABASE_URL": url,
        "TRIVEC_SECRET": SECRET,
        "TRIVEC_LIFE__DRAIN_GRACE_S": "0",
        "TRIVEC_BACKEND": "fake",
    }


@pytest.fixture(scope="module")
def cluster(
    postgres: PostgresServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    """Two nodes, of which the third test kills one."""
    url = postgres.upgraded_database()
    folders = [tmp_path_factory.mktemp(f"node{number}") for number in range(2)]
    settings = Settings(data_dir=folders[0], database_url=SecretStr(url), secret=SecretStr(SECRET))
    command = [TRIVEC, "serve", "--port", "0", "--data-dir"]
    with ExitStack() as stack:
        nodes = [
            stack.enter_context(started([*command, str(folder)], environ(url)))
            for folder in folders
        ]
        for node in nodes:
            assert until(lambda node=node: ready(node))  # type: ignore[misc]
        yield Cluster(postgres, url, nodes, settings)
    if not postgres.is_running:
        postgres.start()


def ready(node: Server) -> bool:
    return httpx.get(f"{node.url}/readyz", timeout=60).status_code == 200


@dataclass
class Sent:
    """What clients were told, on all nodes together."""

    tokens: dict[str, int] = field(default_factory=dict)  # of each 200, by request id
    statuses: set[int] = field(default_factory=set)
    first_s: float = float("inf")
    served_s: float = float("inf")  # first answered with 200
    last_s: float = 0.0

    def send(self, node: Server, key: str, texts: list[str], is_over: threading.Event) -> None:
        """Ask until it is over, or the node is."""
        headers = {"Authorization": f"Bearer {key}"}
        body = {"model": MODEL, "input": texts, "encoding_format": "base64"}
        with httpx.Client(base_url=node.url, headers=headers, timeout=60) as client:
            while not is_over.is_set():
                self.first_s = min(self.first_s, time.monotonic())
                try:
                    answer = client.post("/v1/embeddings", json=body)
                except httpx.TransportError:
                    if node.process.poll() is not None:
                        return
                    continue
                self.statuses.add(answer.status_code)
                if answer.status_code == 200:
                    self.tokens[answer.headers["x-request-id"]] = answer.json()["usage"][
                        "total_tokens"
                    ]
                    self.last_s = time.monotonic()
                    self.served_s = min(self.served_s, self.last_s)
                else:
                    assert float(answer.headers["retry-after"]) >= 0


@contextmanager
def sending(
    nodes: list[Server], key: str, texts: Sequence[str] = ("Hello, world", "a text")
) -> Iterator[Sent]:
    """Clients that ask all *nodes* for as long as the block takes."""
    sent, is_over = Sent(), threading.Event()
    with ThreadPoolExecutor(SENDERS * len(nodes)) as threads:
        asked = [
            threads.submit(sent.send, node, key, list(texts), is_over)
            for node in nodes
            for _ in range(SENDERS)
        ]
        try:
            yield sent
        finally:
            is_over.set()
    for one in asked:
        one.result()


def test_nodes_let_in_together_what_the_limit_allows(cluster: Cluster) -> None:
    key = cluster.new_key("limited", RateLimits(LIMIT, 1_000_000))
    with sending(cluster.nodes, key) as sent:
        assert until(lambda: 429 in sent.statuses)
        begun_s = time.monotonic()
        assert until(lambda: time.monotonic() - begun_s > 1.5)
        until_s = time.monotonic()

    most = LIMIT + LIMIT / 60 * (sent.last_s - sent.first_s)
    least = LIMIT + LIMIT / 60 * (until_s - sent.served_s)
    assert least - LIMIT / 100 <= len(sent.tokens) <= most + LIMIT / 100
    assert sent.statuses == {200, 429}
    assert cluster.rows("limited") == sent.tokens


def test_a_key_is_refused_by_every_node_within_a_second(cluster: Cluster) -> None:
    key = cluster.new_key("leaked", RateLimits())
    headers = {"Authorization": f"Bearer {key}"}
    clients = [httpx.Client(base_url=node.url, headers=headers) for node in cluster.nodes]
    for client in clients:
        assert client.get("/v1/models").status_code == 200
    cluster.revoke("leaked")
    revoked_s = time.monotonic()

    def refused() -> bool:
        return all(client.get("/v1/models").status_code == 401 for client in clients)

    assert until(refused)
    assert time.monotonic() - revoked_s < 1
    for client in clients:
        client.close()


OUTAGE_S = 30.0


@pytest.mark.reference
def test_half_a_minute_without_postgres_bills_what_was_answered_and_needs_no_operator(
    cluster: Cluster,
) -> None:
    """Postgres crashes under small requests and under large ones, which are computed meanwhile."""
    key = cluster.new_key("outage", RateLimits(1_000_000, 1_000_000_000))
    large = ["a text of some length, " * 20] * 200
    with sending(cluster.nodes, key) as sent, sending(cluster.nodes, key, large) as sent_large:
        both = (sent, sent_large)
        assert until(lambda: all(len(one.tokens) > 50 for one in both))
        cluster.postgres.stop(mode="immediate")
        gone_s = time.monotonic()
        assert until(lambda: not any(map(ready, cluster.nodes)))
        served = [len(one.tokens) for one in both]
        assert until(lambda: time.monotonic() - gone_s > OUTAGE_S)
        assert [len(one.tokens) for one in both] == served, "unmetered"
        cluster.postgres.start()
        assert until(lambda: all(map(ready, cluster.nodes)))
        assert until(
            lambda: all(len(one.tokens) > 50 + n for one, n in zip(both, served, strict=True))
        )

    assert sent.statuses == sent_large.statuses == {200, 503}
    told, rows = sent.tokens | sent_large.tokens, cluster.rows("outage")
    assert {name: rows.get(name) for name in told} == told
    assert len(rows) - len(told) <= 2 * SENDERS * len(cluster.nodes), "in flight at the crash"
    with open_administration(cluster.settings, clock=SystemClock()) as books:
        key_id = books.show_key("outage").id
        [usage] = books.usage(UsageQuery(UsageBy.KEY, key_id=key_id))
    assert usage.tokens == sum(rows.values())
    assert usage.requests - usage.failed == len(rows)


def test_what_clients_were_told_is_in_the_ledger_though_postgres_restarts_and_a_node_is_killed(
    cluster: Cluster,
) -> None:
    key = cluster.new_key("audited", RateLimits(1_000_000, 100_000_000))
    killed = cluster.nodes[-1]
    with sending(cluster.nodes, key) as sent:
        assert until(lambda: len(sent.tokens) > 100)
        cluster.postgres.stop(mode="fast")
        assert until(lambda: not any(map(ready, cluster.nodes)))
        cluster.postgres.start()
        assert until(lambda: all(map(ready, cluster.nodes)))
        before = len(sent.tokens)
        assert until(lambda: len(sent.tokens) > before + 100)
        killed.process.kill()
        before = len(sent.tokens)
        assert until(lambda: len(sent.tokens) > before + 100)

    assert sent.statuses == {200, 503}
    rows = cluster.rows("audited")
    assert {name: rows.get(name) for name in sent.tokens} == sent.tokens
    unseen = len(rows) - len(sent.tokens)
    assert unseen <= 2 * SENDERS, "in flight, once at the killed node and once at Postgres' end"


STORE_LINK = ("10.213.84.1", "10.213.84.2")  # our end and the node's
CLIENT_LINK = ("10.213.85.1", "10.213.85.2")
INSIDE = (  # waits for its links, which come from outside
    "ip link set lo up; "
    f"until ip addr add {STORE_LINK[1]}/24 dev store-in 2>/dev/null; do sleep 0.05; done; "
    f"until ip addr add {CLIENT_LINK[1]}/24 dev client-in 2>/dev/null; do sleep 0.05; done; "
    'ip link set store-in up; ip link set client-in up; exec "$@"'
)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@contextmanager
def links_to(pid: int) -> Iterator[None]:
    """Two links to the network namespace that *pid* is about to have."""
    theirs, own = Path(f"/proc/{pid}/ns/net"), Path("/proc/self/ns/net").readlink()
    assert until(lambda: theirs.readlink() != own)
    for name, (ours, _) in (("store", STORE_LINK), ("client", CLIENT_LINK)):
        ip("link", "add", f"{name}-out", "type", "veth", "peer", f"{name}-in", "netns", str(pid))
        ip("addr", "add", f"{ours}/24", "dev", f"{name}-out")
        ip("link", "set", f"{name}-out", "up")
    yield
    for name in ("store", "client"):
        ip("link", "del", f"{name}-out")


RELAY = """
import asyncio, sys

async def relay(reader, writer):
    theirs, ours = await asyncio.open_connection("127.0.0.1", int(sys.argv[2]))

    async def pass_on(source, to):
        while some := await source.read(1 << 16):
            to.write(some)
        to.close()

    await asyncio.gather(pass_on(reader, ours), pass_on(theirs, writer), return_exceptions=True)

async def main():
    await (await asyncio.start_server(relay, sys.argv[1], int(sys.argv[2]))).serve_forever()

asyncio.run(main())
"""


@contextmanager
def relayed(port: int) -> Iterator[None]:
    """Postgres, which listens on the loopback address, at our end of the link too."""
    with subprocess.Popen([sys.executable, "-c", RELAY, STORE_LINK[0], str(port)]) as relay:
        yield
        relay.kill()


@pytest.fixture(scope="module")
def far_node(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A node in a network namespace of its own, as on another machine."""
    try:
        subprocess.run(["unshare", "--net", "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no network namespaces here")
    far = cluster.url.replace("127.0.0.1", STORE_LINK[0])
    serve = [TRIVEC, "serve", "--host", CLIENT_LINK[1], "--port", "8000"]
    serve += ["--data-dir", str(tmp_path_factory.mktemp("far"))]
    command = ["unshare", "--net", "sh", "-c", INSIDE, "sh", *serve]
    with (
        started(command, environ(far)) as node,
        links_to(node.process.pid),
        relayed(cluster.postgres.port),
    ):
        assert until(lambda: ready(node))
        yield node


def test_a_node_that_is_cut_off_is_not_ready_within_two_seconds_and_comes_back_by_itself(
    cluster: Cluster, far_node: Server
) -> None:
    key = cluster.new_key("far", RateLimits(1_000_000, 100_000_000))
    with sending([far_node], key) as sent:
        assert until(lambda: len(sent.tokens) > 50)
        ip("link", "set", "store-out", "down")
        cut_s = time.monotonic()
        assert until(lambda: not ready(far_node))
        assert time.monotonic() - cut_s < 2
        served = len(sent.tokens)
        assert until(lambda: 503 in sent.statuses)
        begun_s = time.monotonic()
        assert until(lambda: time.monotonic() - begun_s > 1.5)
        assert len(sent.tokens) == served, "nothing is served that nobody could write down"
        ip("link", "set", "store-out", "up")
        assert until(lambda: ready(far_node))
        assert until(lambda: len(sent.tokens) > served + 50)

    assert sent.statuses == {200, 503}
    rows = cluster.rows("far")
    assert {name: rows.get(name) for name in sent.tokens} == sent.tokens
    assert len(rows) - len(sent.tokens) <= SENDERS, "in flight when the link went down"


def test_a_node_that_is_cut_off_without_a_request_is_not_ready_either(far_node: Server) -> None:
    ip("link", "set", "store-out", "down")
    cut_s = time.monotonic()
    assert until(lambda: not ready(far_node))
    assert time.monotonic() - cut_s < 2
    ip("link", "set", "store-out", "up")
    assert until(lambda: ready(far_node))
