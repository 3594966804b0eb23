"""`trivec bench`: figures of a model in this process or of a server, and one line where it cannot."""

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.api.house import MODEL, PLAIN_MODEL, House
from typer.testing import CliRunner

from trivec.cli import app
from trivec.core.errors import StartError


def bench(*words: str) -> str:
    """What it prints on standard output."""
    result = CliRunner().invoke(
        app,
        ["bench", "--seconds", "0.1", *words],
        env={"TRIVEC_BACKEND": "fake"},
        catch_exceptions=False,
    )
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def server() -> Iterator[dict[str, str]]:
    """The base URL and the key of a server in this process."""
    house = House()
    with house.listening() as address:
        yield {"url": f"{address}/v1", "key": house.key}
    house.close()


def test_a_model_in_this_process_has_a_rate_for_each_length_it_reads(tmp_path: Path) -> None:
    found: dict[str, Any] = json.loads(bench("--data-dir", str(tmp_path), "--json"))
    assert found["model"] == "all-minilm-l6-v2"
    assert [row["text"] for row in found["rows"]] == ["16 tokens", "128 tokens"]
    for row in found["rows"]:
        assert row["tokens/s"] == pytest.approx(row["texts/s"] * int(row["text"].split()[0]))
    assert not (tmp_path / "trivec.db").exists(), "measuring needs no store"


def test_a_server_has_a_rate_and_latencies_for_each_number_of_clients(
    server: dict[str, str],
) -> None:
    shown = bench("--url", server["url"], "--key", server["key"], "--model", PLAIN_MODEL)
    assert shown.split()[:6] == ["clients", "x", "texts", "texts/s", "p50", "ms"]
    found = json.loads(bench("--url", server["url"], "--key", server["key"], "--json"))
    assert found["model"] == MODEL, "the first that it lists"
    assert [row["clients x texts"] for row in found["rows"]] == ["1x1", "16x1", "8x8", "4x64"]
    assert all(0 < row["p50 ms"] <= row["p99 ms"] for row in found["rows"])
    assert all(row["texts/s"] > 0 for row in found["rows"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"model": "gpt"}, f"serves {MODEL}, {PLAIN_MODEL}, and not gpt", id="model"),
        pytest.param({"key": "tv_wrong"}, "refuses this key; give another with --key", id="key"),
        pytest.param({"prefix": "/v2"}, "answered 404", id="prefix"),
    ],
)
def test_what_a_server_refuses_is_one_line(
    server: dict[str, str], changes: dict[str, str], message: str
) -> None:
    url = server["url"].replace("/v1", changes.get("prefix", "/v1"))
    words = ["--url", url, "--key", changes.get("key", server["key"])]
    with pytest.raises(StartError, match=message):
        bench(*words, *(["--model", changes["model"]] if "model" in changes else []))


def test_an_address_where_nobody_listens_is_one_line() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    with pytest.raises(StartError, match=f"no server answers at .*:{port}/v1") as said:
        bench("--url", f"http://127.0.0.1:{port}/v1")
    assert "\n" not in str(said.value)
