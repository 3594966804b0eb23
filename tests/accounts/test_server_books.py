"""The books of a real server over HTTP: audited to the token, and through kill -9 of its process."""

import random
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import Row, select, text
from tests.accounts.processes import long_or_short
from tests.accounts.requests import plan_of
from tests.process.server import Server, running

from trivec.accounts.stores import open_administration
from trivec.accounts.stores.engines import SQLITE_FILE, Engines, postgres_engines, sqlite_engines
from trivec.accounts.stores.tables import ledger
from trivec.core.clock import SystemClock
from trivec.settings import load_settings

pytestmark = pytest.mark.process

KILLS = long_or_short(long=100, short=4)
CLIENTS = 8  # while it is killed
AUDITED = long_or_short(long=100_000, short=1_000)
KEYS = 50
CONNECTIONS = 16
FIXED_KEY = "a-fixed-key-of-the-tests"
MODEL = "all-minilm-l6-v2"


@dataclass(frozen=True)
class Books:
    """Where a server keeps its books, and how a test reads them."""

    folder: Path
    environ: dict[str, str]
    engines: Engines


@pytest.fixture(params=["sqlite", "postgres"])
def books(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Books]:
    environ = {
        "TRIVEC_API_KEY": FIXED_KEY,
        "TRIVEC_LIFE__DRAIN_GRACE_S": "0",
        "TRIVEC_LOG_LEVEL": "error",  # else a line a request, which waiting for one reads again
    }
    if request.param == "sqlite":
        engines = sqlite_engines(tmp_path / SQLITE_FILE)
    else:
        url = request.getfixturevalue("postgres").upgraded_database()
        engines, environ["TRIVEC_DATABASE_URL"] = postgres_engines(url), url
    yield Books(tmp_path, environ, engines)
    engines.dispose()


class Crowd:
    """Connections that ask without end and remember every 200 they saw."""

    def __init__(self, url: str, seen: dict[str, int]) -> None:
        self._url = url
        self._changed = threading.Condition()
        self._is_over = False
        self._seen = seen  # tokens by request id

    def ask_without_end(self, seed: int) -> None:
        dice = random.Random(seed)
        headers = {"Authorization": f"Bearer {FIXED_KEY}"}
        with httpx.Client(base_url=self._url, headers=headers, timeout=60) as client:
            while not self._is_over:
                body = {"model": MODEL, "input": "word " * dice.randrange(1, 60)}
                try:
                    answer = client.post("/v1/embeddings", json=body)
                except httpx.TransportError:  # killed while it answered
                    return
                if answer.status_code == 200:
                    self._remember(answer)

    def _remember(self, answer: httpx.Response) -> None:
        with self._changed:
            self._seen[answer.headers["x-request-id"]] = answer.json()["usage"]["total_tokens"]
            self._changed.notify_all()

    def wait_for_more(self, count: int) -> None:
        with self._changed:
            wanted = len(self._seen) + count
            assert self._changed.wait_for(lambda: len(self._seen) >= wanted, timeout=60)

    def __enter__(self) -> "Crowd":
        return self

    def __exit__(self, *_: object) -> None:
        """They finish what they are at and leave."""
        self._is_over = True


def test_every_200_that_was_seen_has_its_row_whenever_the_server_was_killed(books: Books) -> None:
    dice = random.Random(3)
    seen: dict[str, int] = {}
    for _ in range(KILLS):
        with running(books.folder, "--backend", "fake", environ=books.environ) as server:
            crowd = Crowd(server.url, seen)
            with ThreadPoolExecutor(CLIENTS) as threads, crowd:
                asking = [threads.submit(crowd.ask_without_end, seed) for seed in range(CLIENTS)]
                crowd.wait_for_more(dice.randrange(1, 100))
                server.signal(signal.SIGKILL)
                server.exit_code()
            for asked in asking:
                asked.result()

    rows = rows_of(books)
    written = {row.request_id: row.token_count for row in rows if row.status == 200}
    assert len({row.request_id for row in rows}) == len(rows)
    assert {name: written.get(name) for name in seen} == seen
    assert len(written) - len(seen) <= KILLS * CLIENTS, "more than was on its way"
    assert len(seen) > KILLS


class Auditor:
    """One client that keeps its own accounts, by key id."""

    def __init__(self, url: str, keys: dict[str, str], *, seed: int) -> None:
        self._client = httpx.Client(base_url=url, timeout=60)
        self._keys = keys  # plain key by id
        self._dice = random.Random(seed)
        self.billed: Counter[str] = Counter()  # as the answers said
        self.counted: Counter[str] = Counter()  # as /tokenize says, once a text

    def send_many(self, count: int) -> None:
        with self._client:
            for _ in range(count):
                self._send()

    def _send(self) -> None:
        key_id = self._dice.choice(sorted(self._keys))
        body = {"model": MODEL, "input": "word " * self._dice.randrange(1, 60)}
        headers = {"Authorization": f"Bearer {self._keys[key_id]}"}
        if self._dice.random() < 0.1:
            self._post("embeddings", {**body, "trunkate": True}, headers, status=400)
        answer = self._post("embeddings", body, headers, status=200)
        self.billed[key_id] += answer.json()["usage"]["total_tokens"]
        tokens = self._post("tokenize", body, headers, status=200).json()
        self.counted[key_id] += sum(one["token_count"] for one in tokens["data"])

    def _post(
        self, route: str, body: object, headers: dict[str, str], *, status: int
    ) -> httpx.Response:
        answer = self._client.post(f"/v1/{route}", json=body, headers=headers)
        assert answer.status_code == status, answer.text
        return answer


def test_the_ledger_is_the_sum_of_what_clients_were_told_and_of_the_texts(books: Books) -> None:
    keys = fifty_keys(books)
    with running(books.folder, "--backend", "fake", environ=books.environ) as server:
        clients = [Auditor(server.url, keys, seed=seed) for seed in range(CONNECTIONS)]
        with ThreadPoolExecutor(CONNECTIONS) as threads:
            list(threads.map(lambda client: client.send_many(AUDITED // CONNECTIONS), clients))
        stop(server)

    told = sum((client.billed for client in clients), Counter())
    counted = sum((client.counted for client in clients), Counter())
    written: Counter[str] = Counter()
    for row in rows_of(books):
        written[row.key_id] += row.token_count
    assert +written == told
    assert +written == counted
    assert told.total() > AUDITED


def fifty_keys(books: Books) -> dict[str, str]:
    settings = load_settings({"data_dir": str(books.folder)}, books.environ)
    with open_administration(settings, clock=SystemClock()) as administration:
        made = [administration.create_key(plan_of(number)) for number in range(KEYS)]
    return {new.key.id: new.plain for new in made}


def stop(server: Server) -> None:
    server.signal(signal.SIGTERM)
    assert server.exit_code() == 0


def rows_of(books: Books) -> list[Row[Any]]:
    with books.engines.reading.begin() as connection:
        if connection.dialect.name == "sqlite":
            assert connection.scalar(text("PRAGMA integrity_check")) == "ok"
        return list(connection.execute(select(ledger)))
