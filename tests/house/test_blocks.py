"""Every code block of README and docs says what it is: output, data that parses, or code that is run.

`tests/clients/test_blocks.py` runs the code. A block that cannot run here has a comment before it that
says why: `<!-- not run: needs a cluster -->`.
"""

import json
import subprocess
import tomllib
from collections.abc import Callable

import pytest
import yaml
from tests.support.blocks import Block, blocks

BLOCKS = blocks()
OUTPUT, DATA, CODE = {"text"}, {"json", "toml", "yaml"}, {"sh", "python", "py"}


def test_every_block_has_a_language_of_ours() -> None:
    known = OUTPUT | DATA | CODE
    assert {one.place: one.language for one in BLOCKS if one.language not in known} == {}
    fences = sum(one.text.count("```") for one in BLOCKS)
    assert fences == 0, "a fence that was not closed, or is indented"


@pytest.mark.parametrize("one", blocks(*DATA), ids=lambda one: one.place)
def test_data_parses(one: Block) -> None:
    parsers: dict[str, Callable[[str], object]] = {
        "json": json.loads,
        "toml": tomllib.loads,
        "yaml": yaml.safe_load,
    }
    assert parsers[one.language](one.text)


@pytest.mark.parametrize("one", blocks("python", "py"), ids=lambda one: one.place)
def test_python_compiles(one: Block) -> None:
    compile(one.text, one.place, "exec")


def test_every_program_is_on_a_page_whose_programs_have_a_test() -> None:
    """`tests/clients`: `test_use_pages.py`, `test_bulk_page.py`, `test_batches.py`."""
    tested = ("docs/use/", "docs/bulk.md", "docs/batches.md")
    assert [one.place for one in blocks("python") if not one.page.startswith(tested)] == []


def test_shell_has_no_error_of_syntax() -> None:
    for one in blocks("sh"):
        run = subprocess.run(
            ["bash", "-n"], input=one.text, text=True, capture_output=True, check=False
        )
        assert run.returncode == 0, f"{one.place}: {run.stderr}"


def test_a_block_that_is_not_run_says_why_and_is_code() -> None:
    marked = [one for one in BLOCKS if one.reason]
    assert marked
    assert [one.place for one in marked if one.language not in CODE] == []
