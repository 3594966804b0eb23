"""One batch on real servers that are killed at random moments, and what is true of it in the end."""

import json
import random
import sqlite3
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path

import httpx
from tests.process.server import Server, running

MODEL = "all-minilm-l6-v2"
ENDED = ("completed", "failed", "cancelled", "expired")


def input_lines(count: int, *, words: int = 0) -> bytes:
    """Requests of a text each, of some *words* more; every hundredth asks for more than there is."""
    lines = []
    for i in range(count):
        body: dict[str, object] = {"model": MODEL, "input": f"text number {i}" + " word" * words}
        if i % 100 == 99:
            body["dimensions"] = 50_000
        lines.append(
            {"custom_id": f"c{i}", "method": "POST", "url": "/v1/embeddings", "body": body}
        )
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def submit(client: httpx.Client, content: bytes) -> str:
    """The id of a new batch of the lines in *content*."""
    form = {"purpose": "batch"}
    file = client.post("/v1/files", files={"file": ("in.jsonl", content)}, data=form).json()
    asked = {
        "input_file_id": file["id"],
        "endpoint": "/v1/embeddings",
        "completion_window": "24h",
    }
    made = client.post("/v1/batches", json=asked)
    assert made.status_code == 200, made.text
    return str(made.json()["id"])


def run_batch_through_kills(
    data_dirs: Sequence[Path],
    arguments: Sequence[str],
    *,
    line_count: int,
    kills: int,
    seed: int,
    environ: Mapping[str, str],
    pause_s: float,
    words: int = 0,
) -> dict[str, object]:
    """Run a batch to its end while one of the servers is killed again and again; what is found.

    A server each of *data_dirs*; where there are several, *environ* names their common store.
    """
    randomly = random.Random(seed)
    with ExitStack() as stack:

        def start(folder: Path) -> Server:
            server = stack.enter_context(running(folder, *arguments, environ=environ))
            assert server.url
            return server

        servers = [start(folder) for folder in data_dirs]
        key = environ.get("TRIVEC_API_KEY") or servers[0].key
        headers = {"Authorization": f"Bearer {key}"}

        def client(server: Server) -> httpx.Client:
            return httpx.Client(base_url=server.url, headers=headers, timeout=120)

        with client(servers[0]) as first:
            batch_id = submit(first, input_lines(line_count, words=words))
        killed = 0
        while killed < kills:
            time.sleep(randomly.uniform(0, pause_s))  # the moment is what is random here
            at = randomly.randrange(len(servers))
            servers[at].process.kill()
            servers[at].process.wait()
            killed += 1
            servers[at] = start(data_dirs[at])
            with client(servers[at]) as one:
                status = one.get(f"/v1/batches/{batch_id}").json()["status"]
            if status in ENDED:
                break
        with client(servers[-1]) as last:
            batch = wait_until_ended(last, batch_id)
            output = last.get(f"/v1/files/{batch['output_file_id']}/content").content
            error = last.get(f"/v1/files/{batch['error_file_id']}/content").content
    return {"batch": batch, "output": output, "error": error, "killed": killed}


def wait_until_ended(client: httpx.Client, batch_id: str, *, within_s: float = 900) -> dict:  # type: ignore[type-arg]
    until_s = time.monotonic() + within_s
    while time.monotonic() < until_s:
        batch: dict[str, object] = client.get(f"/v1/batches/{batch_id}").json()
        if batch["status"] in ENDED:
            return batch
        time.sleep(0.2)
    raise AssertionError(f"the batch has not ended: {batch}")


def check(found: Mapping[str, object], ledger: Sequence[tuple[str, int, int]], lines: int) -> None:
    """Each line answered exactly once and billed exactly once; usage is the ledger's to the token.

    *ledger*: request id, status and tokens of each row of the key.
    """
    batch, output, error = found["batch"], found["output"], found["error"]
    assert isinstance(batch, dict)
    assert isinstance(output, bytes)
    assert isinstance(error, bytes)
    bad = lines // 100
    assert batch["status"] == "completed", batch
    assert batch["request_counts"] == {"total": lines, "completed": lines - bad, "failed": bad}
    good_lines = [json.loads(line) for line in output.splitlines()]
    bad_lines = [json.loads(line) for line in error.splitlines()]
    answered = Counter(line["custom_id"] for line in good_lines + bad_lines)
    assert answered == Counter(f"c{i}" for i in range(lines))
    assert {line["response"]["status_code"] for line in bad_lines} == {400}
    billed = {request_id: tokens for request_id, _, tokens in ledger}
    assert len(billed) == len(ledger)
    told = {line["id"]: line["response"]["body"]["usage"]["total_tokens"] for line in good_lines}
    assert {one: tokens for one, tokens in billed.items() if one.startswith("batch_req_")} == told
    assert batch["usage"]["total_tokens"] == sum(told.values())


def sqlite_ledger(data_dir: Path) -> list[tuple[str, int, int]]:
    with closing(sqlite3.connect(data_dir / "trivec.sqlite3")) as connection:
        return connection.execute("SELECT request_id, status, token_count FROM ledger").fetchall()
