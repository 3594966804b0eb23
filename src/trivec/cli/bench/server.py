"""The rate over HTTP: a server that runs already, or one of our own for as long as it takes."""

import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from trivec.cli.bench.load import Answers, Load, run_load
from trivec.core.errors import StartError

START_S_MAX = 300.0  # a large model's first start hashes, converts and certifies it
POLL_S = 0.05


class ServerFailed(StartError):
    """The server did not become ready, or does not answer as one of ours does."""


class Said(NamedTuple):
    status: int
    body: bytes


@dataclass(frozen=True, slots=True)
class Target:
    """Where a load goes."""

    base_url: str  # with the prefix, as http://127.0.0.1:8000/v1
    model: str
    key: str | None
    pid: int | None = None  # of a server of our own


@dataclass(frozen=True, slots=True)
class Shape:
    """How many clients ask at once, with how many texts each."""

    client_count: int
    text_count: int

    def __str__(self) -> str:
        return f"{self.client_count}x{self.text_count}"


SHAPES = (Shape(1, 1), Shape(16, 1), Shape(8, 8), Shape(4, 64))


def measure(
    target: Target,
    shape: Shape,
    texts: Sequence[str],
    *,
    duration_s: float,
    encoding: str = "base64",
) -> Answers:
    """Load *target* with requests of *shape* over *texts*. Raises `LoadFailed`."""
    bodies = [
        json.dumps(
            {"model": target.model, "input": list(part), "encoding_format": encoding}
        ).encode()
        for part in in_parts(texts, shape.text_count)
    ]
    url = f"{target.base_url}/embeddings"
    return run_load(Load(url, bodies, shape.client_count, duration_s, target.key))


def in_parts(texts: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    """Consecutive parts of exactly *size*; what is left over is dropped."""
    for at in range(0, len(texts) - size + 1, size):
        yield texts[at : at + size]


@contextmanager
def own_server(
    model: str, *, data_dir: Path | None = None, arguments: Sequence[str] = ()
) -> Iterator[Target]:
    """`trivec serve` on a free port until the block ends; without *data_dir*, with a fresh store.

    Its log is kept out of the way and quoted when it does not start: `ServerFailed`.
    """
    key = secrets.token_urlsafe(24)
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="trivec-bench-") as folder:
        log = Path(folder) / "log"
        with log.open("wb") as out:
            process = subprocess.Popen(  # noqa: S603 - ourselves, with the user's own model
                [
                    sys.executable, "-m", "trivec", "serve", "--model", model,
                    "--port", str(port), "--data-dir", str(data_dir or folder), *arguments,
                ],
                env={**os.environ, "TRIVEC_API_KEY": key}, stdout=out, stderr=out,
            )  # fmt: skip
        try:
            base = f"http://127.0.0.1:{port}"
            wait_until_ready(base, process, log)
            yield Target(f"{base}/v1", served_id(f"{base}/v1", key), key, process.pid)
        finally:
            process.terminate()
            process.wait(60)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def wait_until_ready(
    base_url: str, process: "subprocess.Popen[bytes]", log: Path, *, path: str = "/readyz"
) -> float:
    """Seconds until *path* answers 200. Raises `ServerFailed` with the end of *log*."""
    started_s = time.perf_counter()
    while time.perf_counter() - started_s < START_S_MAX and process.poll() is None:
        try:
            status, _ = ask(f"{base_url}{path}")
            if status == HTTPStatus.OK:
                return time.perf_counter() - started_s
        except (OSError, HTTPException):
            pass
        time.sleep(POLL_S)
    said = log.read_text(errors="replace")[-2000:]
    raise ServerFailed(f"the server was not ready (exit code {process.poll()}):\n{said}")


def served_id(base_url: str, key: str | None, model: str | None = None) -> str:
    """*model* where the server at *base_url* serves it, else the first that it lists.

    Raises `ServerFailed`, with one line for a person.
    """
    try:
        status, body = ask(f"{base_url}/models", key)
        names = [str(one["id"]) for one in json.loads(body)["data"]] if status == 200 else []
    except (OSError, HTTPException, ValueError, KeyError, TypeError) as fault:
        raise ServerFailed(
            f"no server of ours answers at {base_url} ({fault}); give its base URL with the "
            "prefix, as http://127.0.0.1:8000/v1"
        ) from fault
    if status == HTTPStatus.UNAUTHORIZED:
        raise ServerFailed(f"{base_url} refuses this key; give another with --key")
    if not names:
        raise ServerFailed(f"{base_url}/models answered {status}; wait until a model is served")
    if model is None:
        return names[0]
    if model not in names:
        raise ServerFailed(f"{base_url} serves {', '.join(names)}, and not {model}")
    return model


def ask(url: str, key: str | None = None) -> Said:
    """One GET on a connection of its own."""
    address = urlsplit(url)
    scheme = HTTPSConnection if address.scheme == "https" else HTTPConnection
    connection = scheme(address.hostname or "", address.port, timeout=10)
    try:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        connection.request("GET", address.path, headers=headers)
        answer = connection.getresponse()
        return Said(answer.status, answer.read())
    finally:
        connection.close()
