"""Starting a stand, asking it things, and reading its books afterwards."""

import json
import re
import sqlite3
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import httpx
from tests.process.server import Server, started
from tests.soak.service import MODEL

KEY = "a-fixed-key-of-the-soak-tests"
ACCESS = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
QUIET = {"TRIVEC_LOG_LEVEL": "warning", "TRIVEC_API_KEY": KEY}
COUNTED = re.compile(r"counted tasks=(\d+) threads=(\d+) fds=(\d+) rss_kib=(\d+)")


@contextmanager
def stand(
    folder: Path, *options: str, environ: Mapping[str, str] | None = None
) -> Iterator[Server]:
    """A stand that is ready; killed at the end if it still runs."""
    command = [sys.executable, "-m", "tests.soak.stand", str(folder), *options]
    with started(command, {**QUIET, **(environ or {})}) as server:
        server.wait_until_it_says("is ready")
        yield server


def body_of(*texts: str) -> bytes:
    return json.dumps({"model": MODEL, "input": list(texts), "encoding_format": "base64"}).encode()


def embed(url: str, *texts: str, timeout_s: float = 30) -> httpx.Response:
    address = f"{url}/v1/embeddings"
    return httpx.post(address, content=body_of(*texts), headers=ACCESS, timeout=timeout_s)


def ready_again(url: str, *, within_s: float) -> float:
    """Seconds until `/readyz` says 200; what it says must be true of the next request."""
    began_s = time.perf_counter()
    while time.perf_counter() - began_s < within_s:
        try:
            ready = httpx.get(f"{url}/readyz", timeout=within_s).status_code == 200
        except httpx.TransportError:
            ready = False
        if ready:
            took_s = time.perf_counter() - began_s
            assert embed(url, "are you there").status_code == 200, "ready while dead"
            return took_s
        time.sleep(0.01)
    raise AssertionError("it did not come back")


def ledger(folder: Path) -> dict[str, tuple[int, int]]:
    """Status and tokens of every row, by request id."""
    with closing(sqlite3.connect(folder / "trivec.sqlite3")) as books:
        rows: Sequence[tuple[str, int, int]] = books.execute(
            "SELECT request_id, status, token_count FROM ledger"
        ).fetchall()
    by_id = {name: (status, tokens) for name, status, tokens in rows}
    assert len(by_id) == len(rows), "a request has two rows"
    return by_id
