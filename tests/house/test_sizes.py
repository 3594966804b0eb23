"""A file is one concept of the field, and says in its first line which."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MODULES = sorted((ROOT / "src" / "trivec").rglob("*.py"))
MODULE_LINES_MAX = 600


def test_a_module_has_at_most_600_lines() -> None:
    lengths = {module: len(module.read_text("utf-8").splitlines()) for module in MODULES}
    assert lengths, "no module was found"
    assert {module: n for module, n in lengths.items() if n > MODULE_LINES_MAX} == {}


def test_a_module_opens_by_saying_what_it_is_for() -> None:
    silent = [module for module in MODULES if not ast.get_docstring(ast.parse(module.read_text()))]
    assert [module.name for module in silent] == ["__main__.py"]
