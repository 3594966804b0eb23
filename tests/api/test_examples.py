"""What `examples/` shows runs as it is written."""

import re
import runpy
from dataclasses import replace
from pathlib import Path
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


def test_the_hybrid_retrieval_that_the_readme_shows_is_short_and_runs() -> None:
    (program,) = re.findall(
        r"^```py\n(.*?)^```$", (ROOT / "README.md").read_text("utf-8"), re.M | re.S
    )
    assert len(program.splitlines()) <= LINES_MAX
    texts = ["the red house", "a red house by the sea", "green hills"]
    house = House(model=StandIn(replace(CARD, token_count_max=256)))
    with (
        house.listening() as address,
        OpenAI(base_url=f"{address}/v1", api_key=house.key) as client,
    ):
        names: dict[str, Any] = {"client": client, "np": np, "texts": texts, "i": 1}
        exec(compile(program, "README.md", "exec"), names)
    house.close()
    dense = names["dense"]
    assert names["score"] > 0.7 * float(dense[0] @ dense[1]), "the words they share count"
