"""The page of results: made from the files, complete, and up to date."""

import xml.etree.ElementTree as ElementTree

import pytest
from benchmarks.plot import Bars, draw
from benchmarks.report import DOCS, SECTIONS, load_results, number, page, plots, short


def test_the_page_and_the_plot_are_what_the_files_make_of_them() -> None:
    """When this fails: python -m benchmarks.report."""
    results = load_results()
    assert (DOCS / "performance.md").read_text() == page(results)
    assert (DOCS / "performance.svg").read_text() == draw(plots(results))


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


def test_a_plot_is_svg_whose_bars_are_as_long_as_their_values() -> None:
    root = ElementTree.fromstring(draw([Bars("a < b", {"trivec": 100.0, "peer": 50.0})]))
    bars = root.findall("{http://www.w3.org/2000/svg}rect")[1:]
    ours, theirs = (int(bar.attrib["width"]) for bar in bars)
    assert ours == 2 * theirs
