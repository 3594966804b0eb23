"""Thousands of bad requests through a real socket: never a 5xx, always the error shape."""

import ctypes
import gc
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import httpx
import msgspec
import pytest
from tests.api.corpus import MODEL, all_cases
from tests.api.house import House

from trivec.api.schemas import ErrorResponse

CASES_MIN = 6_000
CANARY_EVERY = 100
WARM_UP = 1_000  # requests, while caches fill
GROWTH_BYTES_MAX = 20 * 1024 * 1024


@pytest.fixture
def client(shared_house: House, address: str) -> Iterator[httpx.Client]:
    headers = {
        "authorization": f"Bearer {shared_house.key}",
        "content-type": "application/json",
    }
    with httpx.Client(base_url=address, headers=headers, timeout=60) as made:
        yield made


def canary(client: httpx.Client) -> str:
    body = {"model": MODEL, "input": "canary", "encoding_format": "base64"}
    embedding: str = client.post("/v1/embeddings", json=body).json()["data"][0]["embedding"]
    return embedding


def resident_bytes() -> int:
    """Memory of this process that something still holds."""
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)  # what is free, and kept for the next, differs by 20 MiB between runs
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def test_the_corpus_is_as_large_as_it_says() -> None:
    digests = {hashlib.sha256(case.body).digest() for case in all_cases()}
    assert len(digests) >= CASES_MIN


def test_every_bad_request_is_refused_cleanly(client: httpx.Client, shared_house: House) -> None:
    """No 5xx, the error shape, the same canary throughout, and no memory kept."""
    expected = canary(client)
    before_bytes = 0
    for count, case in enumerate(all_cases()):
        response = client.post("/v1/embeddings", content=case.body)
        assert response.status_code in {200, 400, 404}, (case, response.text)
        if response.status_code != 200:
            msgspec.json.decode(response.content, type=ErrorResponse)
            assert len(response.content) < 2_000, case.name
        if count % CANARY_EVERY == 0:
            assert canary(client) == expected, case.name
        if count == WARM_UP:
            before_bytes = resident_bytes()
    shared_house.heard.events.clear()  # of every request: the test holds them, not the server
    assert resident_bytes() - before_bytes < GROWTH_BYTES_MAX


def test_naughty_strings_embed_or_are_refused_cleanly(
    client: httpx.Client, shared_data: Path
) -> None:
    strings = msgspec.json.decode((shared_data / "blns" / "blns.json").read_bytes(), type=list[str])
    assert len(strings) == 515
    for text in strings:
        body = {"model": MODEL, "input": text, "truncate": True, "user": text}
        response = client.post("/v1/embeddings", json=body)
        assert response.status_code == (200 if text else 400), text
        named = client.post("/v1/embeddings", json={"model": text, "input": "a"})
        assert named.status_code == 404, text
        msgspec.json.decode(named.content, type=ErrorResponse)
