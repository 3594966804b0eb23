"""openai-python's files and batches, unchanged: the page's program, and the calls that it leaves out."""

import contextlib
import io
import json
import re
from pathlib import Path
from typing import Any

import openai
import pytest
from tests.process.server import Server

MODEL = "all-minilm-l6-v2"
PAGE = Path(__file__).parents[2] / "docs" / "batches.md"


def requests(count: int) -> bytes:
    lines = [
        {
            "custom_id": f"c{i}",
            "method": "POST",
            "url": "/v1/embeddings",
            "body": {"model": MODEL, "input": f"text {i}"},
        }
        for i in range(count)
    ]
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def test_the_program_of_the_page_does_what_it_says(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    [program] = re.findall(r"^```python\n(.+?)^```", PAGE.read_text("utf-8"), re.M | re.S)
    program = program.replace("http://127.0.0.1:8000", server.url)
    monkeypatch.setenv("TRIVEC_API_KEY", server.key)
    names: dict[str, Any] = {}
    exec(program, names)  # the program of the page
    assert {name: len(vector) for name, vector in names["vectors"].items()} == {
        "text-0": 384,
        "text-1": 384,
    }
    direct = names["client"].embeddings.create(model=MODEL, input="first text")
    assert names["vectors"]["text-0"] == pytest.approx(direct.data[0].embedding, abs=1e-6)
    names["client"].close()


def test_upload_list_cancel_and_delete(server: Server, base_url: str) -> None:
    with openai.OpenAI(base_url=base_url, api_key=server.key, max_retries=0) as client:
        made = [
            client.files.create(
                file=("in.jsonl", io.BytesIO(requests(2))),
                purpose="batch",
                expires_after={"anchor": "created_at", "seconds": 3600},
            )
            for _ in range(3)
        ]
        listed = [file.id for file in client.files.list(purpose="batch", limit=2)]  # every page
        assert {file.id for file in made} <= set(listed)
        assert client.files.retrieve(made[0].id).expires_at == made[0].created_at + 3600
        assert client.files.content(made[0].id).read() == requests(2)

        batch = client.batches.create(
            input_file_id=made[0].id,
            endpoint="/v1/embeddings",
            completion_window="24h",
            metadata={"a": "b"},
            output_expires_after={"anchor": "created_at", "seconds": 3600},
        )
        found = next(one for one in client.batches.list(limit=1) if one.id == batch.id)
        assert found.metadata == {"a": "b"}
        with contextlib.suppress(openai.BadRequestError):  # it may have been done already
            assert client.batches.cancel(batch.id).status in ("cancelling", "cancelled")
        assert client.files.delete(made[1].id).deleted
        with pytest.raises(openai.NotFoundError):
            client.files.retrieve(made[1].id)


def test_files_are_deleted_while_they_are_listed(server: Server) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=server.key) as client:
        made = [
            client.files.create(file=("in.jsonl", requests(1)), purpose="batch").id
            for _ in range(5)
        ]
        for file in client.files.list(limit=2):
            if file.id in made:
                client.files.delete(file.id)
        assert not {file.id for file in client.files.list()} & set(made)


def test_what_is_wrong_with_a_file_is_in_the_batchs_errors(server: Server) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=server.key) as client:
        file = client.files.create(file=("in.jsonl", b"no json\n"), purpose="batch")
        batch = client.batches.create(
            input_file_id=file.id, endpoint="/v1/embeddings", completion_window="24h"
        )
        while batch.status == "validating":
            batch = client.batches.retrieve(batch.id)
        assert batch.status == "failed"
        assert batch.errors is not None
        assert batch.errors.data is not None
        assert (batch.errors.data[0].code, batch.errors.data[0].line) == ("invalid_json_line", 1)
