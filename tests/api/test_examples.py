"""What `examples/` shows runs as it is written."""

import re
import runpy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from openai import OpenAI
from tests.api.house import CARD, House, StandIn

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
LINES_MAX = 15


def test_hybrid_search_scores_every_passage(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    house = House(model=StandIn(replace(CARD, token_count_max=256)))
    with house.listening() as address:
        monkeypatch.setenv("OPENAI_BASE_URL", f"{address}/v1")
        monkeypatch.setenv("OPENAI_API_KEY", house.key)
        shown = runpy.run_path(str(EXAMPLES / "hybrid_search.py"))
    house.close()
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition("  ")[2] for line in lines] == shown["texts"][1:]
    for i, line in enumerate(lines, 1):
        dense = float(shown["dense"][0] @ shown["dense"][i])
        assert float(line.partition("  ")[0]) > 0.7 * dense, "the words they share count"


def test_the_hybrid_retrieval_that_the_docs_show_is_short_and_runs() -> None:
    page = (ROOT / "docs" / "use" / "hybrid.md").read_text("utf-8")
    (program,) = re.findall(r"^```py\n(.*?)^```$", page, re.M | re.S)
    assert len(program.splitlines()) <= LINES_MAX
    texts = ["the red house", "a red house by the sea", "green hills"]
    house = House(model=StandIn(replace(CARD, token_count_max=256)))
    with (
        house.listening() as address,
        OpenAI(base_url=f"{address}/v1", api_key=house.key) as client,
    ):
        names: dict[str, Any] = {"client": client, "np": np, "texts": texts, "i": 1}
        exec(compile(program, "hybrid.md", "exec"), names)
    house.close()
    dense = names["dense"]
    assert names["score"] > 0.7 * float(dense[0] @ dense[1]), "the words they share count"


def test_the_lines_for_vector_stores_in_the_docs_make_their_sparse_vectors() -> None:
    section = (ROOT / "docs" / "api.md").read_text("utf-8").partition("### Sparse vectors in")[2]
    programs = re.findall(r"^```py\n(.*?)^```$", section, re.M | re.S)
    house = House()
    with (
        house.listening() as address,
        OpenAI(base_url=f"{address}/v1", api_key=house.key) as client,
    ):
        answer = client.embeddings.create(
            model=CARD.id,
            input="abc",
            encoding_format="float",
            extra_body={"output_type": "sparse"},
        )
    house.close()
    sparse = answer.data[0].model_dump()["sparse_embedding"]
    pairs = dict(zip(sparse["indices"], sparse["values"], strict=True))
    made = []
    for program in programs:
        assert len(program.splitlines()) == 3
        names: dict[str, Any] = {
            "answer": answer,
            "models": SimpleNamespace(SparseVector=SimpleNamespace),  # Qdrant's, by keyword
        }
        exec(compile(program, "docs/api.md", "exec"), names)
        made.append(names["vector"])
    for_qdrant, for_milvus, for_pgvector = made
    assert (for_qdrant.indices, for_qdrant.values) == (sparse["indices"], sparse["values"])
    assert pairs
    assert for_milvus == pairs
    body, _, size = for_pgvector.removeprefix("{").partition("}/")
    entries = [entry.split(":") for entry in body.split(",")]
    assert size == "250002"
    assert {int(i) - 1: float(v) for i, v in entries} == pairs
