"""The pages say what the code says. (The metrics page has its test beside the metrics.)"""

import ast
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from trivec.checkpoints.catalogue import CATALOGUE
from trivec.settings import setting_paths, variable_name

ROOT = Path(__file__).resolve().parents[2]
DECISIONS = sorted((ROOT / "docs" / "decisions").glob("0*.md"))
DECISIONS_MAX, DECISION_LINES_MAX = 15, 60
REFERENCE: dict[str, Callable[[], str]] = runpy.run_path(str(ROOT / "scripts/reference.py"))[
    "PAGES"
]


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text("utf-8")


def test_the_configuration_page_is_what_the_settings_say() -> None:
    script = ROOT / "scripts" / "configuration.py"
    made = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert page("configuration.md") == made.stdout, (
        "run: python scripts/configuration.py > docs/configuration.md"
    )


@pytest.mark.parametrize("name", REFERENCE)
def test_a_page_that_is_made_from_the_code_is_what_the_code_says(name: str) -> None:
    assert (ROOT / name).read_text("utf-8") == REFERENCE[name](), "run: make generated"


def test_every_setting_is_on_the_configuration_page() -> None:
    text = page("configuration.md")
    for path in setting_paths():
        name = "TRIVEC_MODEL" if path == "models" else variable_name(path)
        assert f"`{name}`" in text


def test_every_error_is_in_the_tree_that_the_module_draws() -> None:
    source = (ROOT / "src" / "trivec" / "core" / "errors.py").read_text("utf-8")
    module = ast.parse(source)
    drawn = ast.get_docstring(module) or ""
    names = [node.name for node in module.body if isinstance(node, ast.ClassDef)]
    assert [name for name in names if not re.search(rf"\b{name}\b", drawn)] == []


def test_decisions_are_few_short_and_in_the_index() -> None:
    numbers = [file.name[:4] for file in DECISIONS]
    assert 0 < len(numbers) == len(set(numbers)) <= DECISIONS_MAX
    assert re.findall(r"\]\((0\S+)\)", page("decisions/README.md")) == [f.name for f in DECISIONS]
    lengths = {file.name: len(file.read_text("utf-8").splitlines()) for file in DECISIONS}
    assert {name: n for name, n in lengths.items() if n > DECISION_LINES_MAX} == {}


def anchors(page: Path) -> set[str]:
    """Those of *page*'s headings."""
    text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w -]", "", one.lower()).replace(" ", "-") for one in headings}


def test_links_between_our_pages_lead_somewhere() -> None:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    links = [
        (page, target, (page.parent / file).resolve() if file else page, anchor)
        for page in pages
        for target in re.findall(r"\]\(([^):]+)\)", page.read_text("utf-8"))
        for file, _, anchor in [target.partition("#")]
    ]
    broken = [
        f"{page.relative_to(ROOT)}: {target}"
        for page, target, file, anchor in links
        if not file.exists() or (anchor and anchor not in anchors(file))
    ]
    assert broken == []


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 120


def test_the_readme_names_only_models_that_can_be_pulled() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    [row] = re.findall(r"^\| \*\*Models\*\* \| (.+?) and their fine-tunes", text, re.M)
    ids = " ".join(CATALOGUE).lower().replace("-", " ")
    families = [name.lower().replace("-", " ") for name in row.split(", ")]
    assert [name for name in families if name not in ids] == []
    named = re.findall(r"--model ([\w-]+/[\w.-]+)|models pull (\S+)|model=\"([^\"]+)\"", text)
    assert {name for found in named for name in found if name} <= set(CATALOGUE)


def test_a_decision_that_the_code_names_exists() -> None:
    numbers = {file.name[:4] for file in DECISIONS}
    named = {
        f"{file.relative_to(ROOT)}: {number}"
        for folder in ("src", "tests", "benchmarks", "docs")
        for file in (ROOT / folder).rglob("*.*")
        if file.suffix in (".py", ".md")
        for number in re.findall(r"decisions?[ /](0\d{3})", file.read_text("utf-8"))
        if number not in numbers
    }
    assert named == set()
