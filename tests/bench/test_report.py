"""The page of results: made from the files, complete, and up to date."""

import os
import re
import subprocess
import sys

import pytest
from benchmarks.figures import MASK, provenance
from benchmarks.report import DOCS, SECTIONS, load_results, number, page, short


def test_the_page_and_the_plot_are_what_the_files_make_of_them() -> None:
    """When this fails: python -m benchmarks.report."""
    results = load_results()
    assert (DOCS / "performance.md").read_text() == page(results)


def test_every_kept_result_has_a_section_and_says_where_it_comes_from() -> None:
    for name, result in load_results().items():
        if result.get("benchmark") in SECTIONS:
            assert result["provenance"]["commit"] in page({name: result})


@pytest.mark.parametrize(
    ("value", "words"),
    [(1432.4, "1,430"), (98.76, "98.8"), (0.8349, "0.835"), (250_123.0, "250,000"), (0.0, "0")],
)
def test_a_figure_is_shown_with_the_digits_that_mean_something(value: float, words: str) -> None:
    assert short(value) == words


def test_a_spread_shows_its_ends_unless_it_was_measured_once() -> None:
    spread = {"median": 2.0, "lowest": 1.5, "highest": 2.5, "repeats": 3}
    assert number(spread) == "2 (1.5 to 2.5)"
    assert number(spread | {"repeats": 1}) == "2"


def test_every_table_names_the_instructions_of_its_cpu() -> None:
    heads = [
        lines[0]
        for section in page(load_results()).split("\n\n")
        if (lines := section.splitlines()) and lines[0].startswith("| ")
    ]
    assert len(heads) > 10
    assert [head for head in heads if not re.search("VNNI|masked", head)] == []


def test_runs_of_one_thing_share_a_heading() -> None:
    headings = [line for line in page(load_results()).splitlines() if line.startswith("## ")]
    assert len(headings) == len(set(headings))


def test_a_machine_that_was_masked_is_named_for_what_it_was_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in MASK.items():
        monkeypatch.setenv(name, value)
    result = {"benchmark": "profile", "model": "m", "recipe": "r", "lengths": [1], "shares": {}}
    shown = page({"x": {**result, "provenance": provenance()}})
    assert "| kind of node and kernel, AVX2 (masked) |" in shown
    assert "masked to AVX2)" in shown


def test_a_peer_that_failed_is_a_row_that_says_why() -> None:
    one = {"median": 2.0, "lowest": 2.0, "highest": 2.0, "repeats": 1}
    rows = {
        "trivec-int8": {"texts_a_second": one, "ours_over_it": one, "cosine_min": 1.0},
        "ctranslate2-int8": {"failed": "not here: python -m benchmarks.roster ctranslate2"},
    }
    shown = page(
        {
            "x": {
                "benchmark": "against",
                "model": "m",
                "workloads": {"short": rows},
                "provenance": provenance(),
            }
        }
    )
    assert "| ctranslate2-int8 | not here: python -m benchmarks.roster ctranslate2 |" in shown


def test_every_command_on_the_page_can_be_asked_for_help() -> None:
    for command in re.findall(r"^python -m (benchmarks\.\w+)(.*?)(?:  +#.*)?$", page({}), re.M):
        module, options = command
        said = subprocess.run(
            [sys.executable, "-m", module, *options.split(), "--help"],
            cwd=DOCS.parent, capture_output=True, text=True, check=False, timeout=120,
            env={**os.environ, "PYTHONPATH": "src"},
        )  # fmt: skip
        assert said.returncode == 0, f"{module}: {said.stderr}"
