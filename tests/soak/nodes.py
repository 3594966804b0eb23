"""Several servers behind HAProxy on one real Postgres, which restarts, while nodes are killed.

`python -m tests.soak.nodes [--nodes 4] [--requests 100000] [--seconds 60] [--rounds 12]`

The servers have the fake backend, which computes nothing; Postgres is durable. Three parts:

* cost: processor time of the nodes a request, when one of them is asked and when all are, each by as
  many clients, in turns: of a key with both limits over one without, which leases nothing.
* limit: clients ask for more than a key may have for a while after its burst: what was let in over
  what its limit allows in that time.
* audit: a number of requests, with a node killed (`kill -9`, then started again) every so often and
  Postgres restarted in the middle: each 200 that a client saw against its row, token by token. Rows
  that no client saw the answer of were in flight at a kill.

The last line is JSON.
"""

import argparse
import asyncio
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import httpx
import psycopg
from pydantic import SecretStr
from tests.accounts.postgres import PostgresServer, binaries, free_port, postgres_server
from tests.process.server import TRIVEC, clean_environment

from trivec.accounts import KeyPlan, RateLimits
from trivec.accounts.stores import open_administration
from trivec.core.clock import SystemClock
from trivec.settings import Settings

TICKS_A_SECOND = os.sysconf("SC_CLK_TCK")
SECRET = "a secret that the nodes have in common"
CLIENTS = 32
LIMIT = 3_000  # requests a minute
PLENTY = RateLimits(1_000_000_000, 1_000_000_000)
HAPROXY = """
global
    maxconn 512
defaults
    mode http
    timeout connect 2s
    timeout client 60s
    timeout server 60s
    option redispatch
frontend all
    bind 127.0.0.1:{port}
    default_backend nodes
backend nodes
    balance roundrobin
    option httpchk GET /readyz
    default-server check inter 250 fall 1 rise 1
"""


@dataclass
class Nodes:
    """Servers on fixed ports, of which any can be killed and started again."""

    url: str
    folder: Path
    ports: list[int]
    running: dict[int, "subprocess.Popen[bytes]"] = field(default_factory=dict)

    def start(self, number: int) -> None:
        environ = {
            "TRIVEC_DATABASE_URL": self.url,
            "TRIVEC_SECRET": SECRET,
            "TRIVEC_BACKEND": "fake",
            "TRIVEC_PORT": str(self.ports[number]),
            "TRIVEC_DATA_DIR": str(self.folder / f"node{number}"),
        }
        self.running[number] = subprocess.Popen(
            [TRIVEC, "serve"], env=clean_environment(environ), stderr=subprocess.DEVNULL
        )

    def kill(self, number: int) -> None:
        self.running[number].kill()
        self.running[number].wait()

    def are_ready(self) -> bool:
        try:
            urls = [f"http://127.0.0.1:{port}/readyz" for port in self.ports]
            return all(httpx.get(url, timeout=10).status_code == 200 for url in urls)
        except httpx.TransportError:
            return False

    def wait_until_ready(self) -> None:
        while not self.are_ready():
            time.sleep(0.2)

    def cpu_s(self) -> float:
        return sum(tree_cpu_s(process.pid) for process in self.running.values())


def tree_cpu_s(pid: int) -> float:
    """Processor time of a process and of all below it that still run."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    ticks = int(fields[11]) + int(fields[12])
    return ticks / TICKS_A_SECOND + sum(tree_cpu_s(int(child)) for child in children)


@contextmanager
def cluster(count: int) -> Iterator[tuple[PostgresServer, Nodes, int]]:
    """Postgres, nodes, and HAProxy's port."""
    folder_of_postgres, haproxy = binaries(), shutil.which("haproxy", path="/usr/sbin:/usr/bin")
    assert folder_of_postgres is not None, "install postgresql"
    assert haproxy is not None, "install haproxy"
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        postgres = stack.enter_context(postgres_server(folder_of_postgres, is_durable=True))
        nodes = Nodes(postgres.upgraded_database(), folder, [free_port() for _ in range(count)])
        for number in range(count):
            nodes.start(number)
            stack.callback(nodes.kill, number)
        nodes.wait_until_ready()
        port = free_port()
        servers = [f"    server n{at} 127.0.0.1:{one}" for at, one in enumerate(nodes.ports)]
        (folder / "haproxy.cfg").write_text("\n".join([HAPROXY.format(port=port), *servers, ""]))
        balancer = subprocess.Popen([haproxy, "-q", "-db", "-f", str(folder / "haproxy.cfg")])
        stack.callback(balancer.wait)
        stack.callback(balancer.kill)
        time.sleep(1)
        yield postgres, nodes, port


@dataclass
class Told:
    """What clients were told."""

    tokens: dict[str, int] = field(default_factory=dict)  # of each 200, by request id
    statuses: Counter[str] = field(default_factory=Counter)
    without_retry_after: int = 0

    async def client(self, port: int, key: str, until: "Until") -> None:
        body = json.dumps({"model": "all-minilm-l6-v2", "input": ["Hello, world", "two"]}).encode()
        ask = (
            f"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        ).encode() + body
        streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        while not until.is_over():
            try:
                streams = streams or await asyncio.open_connection("127.0.0.1", port)
                streams[1].write(ask)
                head = (await streams[0].readuntil(b"\r\n\r\n")).decode("latin-1").lower()
                fields = dict(line.split(": ", 1) for line in head.split("\r\n")[1:-2])
                answer = await streams[0].readexactly(int(fields["content-length"]))
            except (OSError, asyncio.IncompleteReadError):
                self.statuses["cut"] += 1
                streams = None
                continue
            status = head.split()[1]
            self.statuses[status] += 1
            if status == "200":
                usage = answer[answer.rindex(b"total_tokens") :]
                total = int(bytes(one for one in usage if 48 <= one < 58))
                self.tokens[fields["x-request-id"]] = total
                continue
            if "x-request-id" in fields:  # else it is HAProxy's, which has no node just now
                self.without_retry_after += "retry-after" not in fields
            if status == "503":
                await asyncio.sleep(0.05)
            if fields.get("connection") == "close":
                streams[1].close()
                streams = None
        if streams is not None:
            streams[1].close()


@dataclass
class Until:
    """When clients stop: after *requests* answered with 200, or at *end_s*."""

    told: Told
    requests: float = float("inf")
    end_s: float = float("inf")

    def is_over(self) -> bool:
        return len(self.told.tokens) >= self.requests or time.monotonic() >= self.end_s


async def send(*ports: int, key: str, requests: float = float("inf"), s: float = 1e9) -> Told:
    """`CLIENTS` for each of *ports*."""
    told = Told()
    until = Until(told, requests, time.monotonic() + s)
    await asyncio.gather(*(told.client(port, key, until) for port in ports for _ in range(CLIENTS)))
    return told


def cost(nodes: Nodes, limited: str, free: str, rounds: int) -> dict[str, float]:
    """What leases add; more processes on the same cores cost a key without limits more, too."""
    many = len(nodes.ports)
    used: dict[tuple[str, int], list[float]] = {
        (key, count): [] for key in (limited, free) for count in (1, many)
    }
    for turn in range(rounds + 1):
        for (key, count), taken in used.items():
            before_s = nodes.cpu_s()
            told = asyncio.run(send(*nodes.ports[:count], key=key, requests=400 * count))
            if turn:  # the first is for what is made at first use
                taken.append((nodes.cpu_s() - before_s) / len(told.tokens) * 1e6)

    def ratio(count: int) -> float:
        pairs = zip(used[limited, count], used[free, count], strict=True)
        return round(median(a / b for a, b in pairs), 3)

    return {
        "one_us": round(median(used[limited, 1])),
        "all_us": round(median(used[limited, many])),
        "limited_over_free_on_one": ratio(1),
        "limited_over_free_on_all": ratio(many),
    }


def limit(port: int, key: str, seconds: float) -> dict[str, float]:
    burst = asyncio.run(send(port, key=key, requests=LIMIT * 0.99))
    asyncio.run(send(port, key=key, s=3))  # the rest of it
    before = time.monotonic()
    told = asyncio.run(send(port, key=key, s=seconds))
    allowed = LIMIT / 60 * (time.monotonic() - before)
    share = len(told.tokens) / allowed
    return {"burst": len(burst.tokens), "let_in": len(told.tokens), "share": round(share, 4)}


async def audit(
    postgres: PostgresServer, nodes: Nodes, port: int, key: str, requests: int
) -> tuple[Told, int]:
    told = Told()
    until = Until(told, requests)
    clients = [asyncio.create_task(told.client(port, key, until)) for _ in range(CLIENTS)]
    kills = 0
    for part in range(1, 10):
        while len(told.tokens) < requests * part / 10:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        if part == 5:
            await asyncio.to_thread(postgres.stop, mode="fast")
            await asyncio.sleep(5)
            await asyncio.to_thread(postgres.start)
        else:
            kills += 1
            nodes.kill(part % len(nodes.ports))
            nodes.start(part % len(nodes.ports))
        print(f"{len(told.tokens)} {dict(told.statuses)}", file=sys.stderr, flush=True)
        await asyncio.sleep(3)
    await asyncio.gather(*clients)
    return told, kills


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--rounds", type=int, default=12)
    given = parser.parse_args()
    with cluster(given.nodes) as (postgres, nodes, port):
        settings = Settings(
            data_dir=nodes.folder,
            database_url=SecretStr(nodes.url),
            secret=SecretStr(SECRET),
        )
        with open_administration(settings, clock=SystemClock()) as books:
            key = books.create_key(KeyPlan("audited", limits=PLENTY)).plain
            free = books.create_key(KeyPlan("free")).plain
            limits = RateLimits(LIMIT, 1_000_000_000)
            limited = books.create_key(KeyPlan("limited", limits=limits)).plain
        figures: dict[str, object] = {"cost": cost(nodes, key, free, given.rounds)}
        print(figures, file=sys.stderr, flush=True)
        figures["limit"] = limit(port, limited, given.seconds)
        print(figures, file=sys.stderr, flush=True)
        with psycopg.connect(nodes.url) as connection:
            (before,) = connection.execute("SELECT max(sequence) FROM ledger").fetchone() or (0,)
        told, kills = asyncio.run(audit(postgres, nodes, port, key, given.requests))
        with psycopg.connect(nodes.url) as connection:
            query = "SELECT request_id, token_count FROM ledger WHERE sequence > %s"
            rows = dict(connection.execute(query, [before]).fetchall())
    figures["audit"] = {
        "requests": len(told.tokens),
        "difference_tokens": sum(abs(rows.get(one, 0) - n) for one, n in told.tokens.items()),
        "rows_unseen": len(rows.keys() - told.tokens.keys()),
        "kills": kills,
        "statuses": dict(told.statuses),
        "without_retry_after": told.without_retry_after,
    }
    print(json.dumps({"benchmark": "nodes", "nodes": given.nodes, **figures}))


if __name__ == "__main__":
    main()
