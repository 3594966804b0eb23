"""A server whose standard error is a full pipe that nobody reads: it serves, and it leaves."""

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from benchmarks.harness import free_port, wait_until_ready
from tests.process.server import TRIVEC, clean_environment

pytestmark = pytest.mark.process

KEY = "a-fixed-key-of-this-test"


@pytest.fixture
def full_pipe() -> Iterator[int]:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    try:
        while True:
            os.write(writing, b"x" * 65_536)
    except BlockingIOError:
        os.set_blocking(writing, True)
    yield writing
    os.close(writing)
    os.close(reading)


def test_a_log_that_nobody_reads_keeps_it_from_nothing(tmp_path: Path, full_pipe: int) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    process = subprocess.Popen(
        [TRIVEC, "serve", "--port", str(port), "--data-dir", str(tmp_path), "--backend", "fake"],
        stderr=full_pipe,
        env=clean_environment({"TRIVEC_API_KEY": KEY, "TRIVEC_LIFE__DRAIN_GRACE_S": "0"}),
    )
    try:
        wait_until_ready(url, process, tmp_path / "none")
        for _ in range(20):
            assert ask(url) == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait(60)


def ask(url: str) -> int:
    body = {"model": "all-minilm-l6-v2", "input": "Hello"}
    access = {"Authorization": f"Bearer {KEY}"}
    return httpx.post(f"{url}/v1/embeddings", json=body, headers=access, timeout=60).status_code
