"""The application on two nodes, as clients see it: also while one of the nodes is killed."""

import asyncio
import itertools
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import psycopg
import pytest
from tests.accounts.postgres import PostgresServer, free_port
from tests.checkpoints.tiny import write_tiny
from tests.cluster.handles import serve
from tests.cluster.nodes import process_ids, wait_until

from trivec.build import load_models, open_parts
from trivec.cluster.serve import ServeArguments, app
from trivec.core.errors import SettingInvalid
from trivec.core.types import Float32Array, LongText, Output
from trivec.settings import load_settings

MODEL = "all-minilm-l6-v2"
KEY = "a-key-of-the-tests-long-enough"
CLIENTS = 8  # of which each has at most one connection cut
BEFORE, AFTER = 150, 900  # answers before the kill and after it
LEAVES_S = 1.0  # what it has asked for takes longer
WAIT_S = 120.0
TEXTS = [f"text number {i} " * (1 + i % 7) for i in range(100)]


class Service:
    """The application, its address and its ledger."""

    def __init__(self, port: int, database: str = "") -> None:
        self.url = f"http://127.0.0.1:{port}/v1"
        self.database = database

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url, api_key=KEY, max_retries=0, timeout=120)

    def billed(self) -> Counter[str]:
        """Successes in the ledger, by the user that the client named: one a request of `outcome`."""
        statement = "SELECT coalesce(user_digest, request_id) FROM ledger WHERE status < 400"
        with psycopg.connect(self.database) as connection:
            rows = connection.execute(statement).fetchall()
        return Counter(row[0] for row in rows)

    def leavers(self) -> int:
        """Requests whose clients did not wait, which the store counts and bills nobody."""
        statement = "SELECT coalesce(sum(requests), 0) FROM counts WHERE status = 499"
        with psycopg.connect(self.database) as connection:
            (found,) = connection.execute(statement).fetchone()
        return int(found)


@contextmanager
def running(arguments: ServeArguments, database: str = "") -> Iterator[Service]:
    """The application on the cluster that this process is a program of."""
    port = free_port()
    serve.start(proxy_location="EveryNode", http_options={"port": port, "host": "127.0.0.1"})
    try:
        serve.run(app(arguments))
        yield Service(port, database)
    finally:
        serve.shutdown()


@pytest.fixture
def service(
    driver: None, second_node: Any, postgres: PostgresServer, tmp_path: Path
) -> Iterator[Service]:
    """Two replicas of the ingress and of two models, on two nodes."""
    database = postgres.upgraded_database()
    folder = tmp_path / "tiny"
    write_tiny(folder, hidden=32, position_count=64)
    arguments = ServeArguments(
        models=(MODEL, f"tiny={folder}"),
        settings={
            "precision": "fp32",
            "data_dir": str(tmp_path / "data"),
            "database_url": database,
            "api_key": KEY,
            "secret": "one secret for all the nodes of the tests",
            "aliases": [f"ada={MODEL}"],
        },
        replicas_min=2,
        replicas_max=2,
        ingress_replicas=2,
        ingress_cpus=0.5,
    )
    with running(arguments, database) as one:
        yield one


def plain_vectors(folder: Path) -> Float32Array:
    """What the model gives for `TEXTS` without Ray: `[texts, dimensions]`."""
    settings = load_settings({"models": (MODEL,), "precision": "fp32", "data_dir": folder}, {})
    models = load_models(settings, open_parts(settings), cores=1)

    async def embed() -> Float32Array:
        models.workers.start()
        embedder = models.embedders[MODEL]
        sequences = await embedder.tokenizer.tokenize(TEXTS, long_text=LongText.REFUSE)
        reply = await embedder.embed(sequences, Output.DENSE)
        await models.workers.stop(5)
        return reply.vectors.dense

    return asyncio.run(embed())


def outcome(client: openai.OpenAI, number: int) -> str:
    """How one request ended."""
    try:
        client.embeddings.create(model=MODEL, input=TEXTS[:4], user=f"request {number}")
    except openai.APIStatusError as refusal:
        is_busy = refusal.status_code == 503 and "retry-after" in refusal.response.headers
        return "busy" if is_busy else f"{refusal.status_code}"
    except openai.APIConnectionError:
        return "cut"
    return "answered"


@contextmanager
def load(service: Service, ask: Callable[[openai.OpenAI], object]) -> Iterator[None]:
    """Clients that *ask*, each again as soon as it has its answer, until the block ends."""
    done = threading.Event()

    def go_on() -> None:
        with service.client() as own:
            while not done.is_set():
                ask(own)

    clients = [threading.Thread(target=go_on) for _ in range(CLIENTS)]
    for one in clients:
        one.start()
    try:
        yield
    finally:
        done.set()
        for one in clients:
            one.join()


def test_clients_see_one_service_also_while_a_node_is_killed(
    service: Service, cluster: Any, second_node: Any, tmp_path: Path
) -> None:
    client = service.client()
    answer = client.embeddings.create(model="ada", input=TEXTS)
    found = np.array([item.embedding for item in answer.data], np.float32)
    assert np.array_equal(found, plain_vectors(tmp_path / "data"))
    other = client.embeddings.create(model="tiny", input=[[4, 5, 6]], dimensions=32)
    assert len(other.data[0].embedding) == 32
    assert {model.id for model in client.models.list()} == {MODEL, "tiny"}
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        client.embeddings.create(model=MODEL, input="word " * 2000)
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="unknown", input="text")
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=service.url, api_key="no", max_retries=0).models.list()
    assert httpx.get(f"{service.url.removesuffix('/v1')}/readyz").status_code == 200

    answer_headers = client.models.with_raw_response.list().headers
    assert len(answer_headers.get_list("x-request-id")) == 1

    lines = [
        {"custom_id": text, "method": "POST", "url": "/v1/embeddings", "body": body}
        for text in TEXTS
        for body in ({"model": MODEL, "input": text},)
    ]
    content = "\n".join(map(json.dumps, lines)).encode()
    file = client.files.create(file=("lines.jsonl", content), purpose="batch")
    batch = client.batches.create(
        input_file_id=file.id, endpoint="/v1/embeddings", completion_window="24h"
    )

    def is_done() -> bool:
        return client.batches.retrieve(batch.id).status == "completed"

    wait_until(is_done, within_s=WAIT_S, what="a batch job")

    billed_before = service.billed()
    # OpenAI's client says how long it waits, and then the server's own deadline may end it first.
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            f"{service.url}/embeddings",
            headers={"authorization": f"Bearer {KEY}"},
            json={"model": MODEL, "input": ["word " * 200] * 1_400},
            timeout=LEAVES_S,
        )
    wait_until(lambda: service.leavers() == 1, within_s=WAIT_S, what="the end of who left")
    assert service.billed() == billed_before
    outcomes: Counter[str] = Counter()
    answered, numbers = threading.Condition(), itertools.count()

    def ask(own: openai.OpenAI) -> None:
        found = outcome(own, next(numbers))
        with answered:
            outcomes[found] += 1
            answered.notify_all()

    with load(service, ask):
        with answered:
            assert answered.wait_for(lambda: outcomes["answered"] >= BEFORE, WAIT_S)
        cluster.remove_node(second_node, allow_graceful=False)
        with answered:
            reached = outcomes["answered"] + AFTER
            assert answered.wait_for(lambda: outcomes["answered"] >= reached, WAIT_S), outcomes

    # The connections of the node's own proxy are cut; every answer is whole, or a time to return.
    others = outcomes["cut"]
    assert outcomes.keys() <= {"answered", "busy", "cut"}, outcomes
    assert others <= outcomes.total() / 100, outcomes
    billed = service.billed() - billed_before
    assert set(billed.values()) == {1}, "a client's request has two rows"
    assert outcomes["answered"] <= billed.total() <= outcomes["answered"] + others


@pytest.mark.filterwarnings("ignore:.*metrics_interval_s")  # Ray has no other way for one model
def test_a_replica_comes_with_the_work_and_goes_with_it(driver: None, tmp_path: Path) -> None:
    arguments = ServeArguments(
        models=(MODEL,),
        settings={"precision": "fp32", "data_dir": str(tmp_path), "no_auth": True},
        replicas_max=2,
        queue_s_target=0.01,
        autoscaling={
            "upscale_delay_s": 0,
            "downscale_delay_s": 0,
            "metrics_interval_s": 0.5,
            "look_back_period_s": 1,
        },
        ingress_cpus=0.5,
    )

    def replicas() -> int:
        deployments = serve.status().applications["default"].deployments
        (model,) = (one for name, one in deployments.items() if name.startswith("model"))
        return int(model.replica_states.get("RUNNING", 0))

    with running(arguments) as service:
        assert replicas() == 1
        ingress = process_ids("ServeReplica:default:ingress")
        with load(service, lambda own: own.embeddings.create(model=MODEL, input=TEXTS)):
            wait_until(lambda: replicas() == 2, within_s=WAIT_S, what="a second replica")
        wait_until(lambda: replicas() == 1, within_s=WAIT_S, what="the end of the second")
        with service.client() as own:
            assert len(own.embeddings.create(model=MODEL, input=TEXTS).data) == len(TEXTS)
        assert process_ids("ServeReplica:default:ingress") == ingress, "it died of a new store"


def test_several_ingresses_need_a_store_that_they_share() -> None:
    with pytest.raises(SettingInvalid, match="database_url"):
        app(ServeArguments(models=(MODEL,), ingress_replicas=2))
