"""What `examples/` shows runs as it is written."""

import runpy
from dataclasses import replace
from pathlib import Path

import pytest
from tests.api.house import CARD, House, StandIn

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


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
