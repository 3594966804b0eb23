"""A file fits on a few screens, a function on one: counted, so that nobody has to argue."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MODULES = sorted((ROOT / "src" / "trivec").rglob("*.py"))
MODULE_LINES_MAX = 400
FUNCTION_LINES_MAX = 50
PARAMETERS_MAX = 5
# Only the composition root calls these; every parameter is a collaborator.
COMPOSED = ("__init__", "build_app")

Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(module: Path) -> Iterator[Function]:
    for node in ast.walk(ast.parse(module.read_text("utf-8"))):
        if isinstance(node, Function):
            yield node


def place_of(module: Path, function: Function) -> str:
    return f"{module.relative_to(ROOT)}:{function.lineno} {function.name}"


def test_a_module_has_at_most_400_lines() -> None:
    lengths = {module: len(module.read_text("utf-8").splitlines()) for module in MODULES}
    assert lengths, "no module was found"
    assert {module: n for module, n in lengths.items() if n > MODULE_LINES_MAX} == {}


def test_a_function_has_at_most_50_lines() -> None:
    lengths = {
        place_of(module, one): (one.end_lineno or 0) - one.lineno + 1
        for module in MODULES
        for one in functions(module)
    }
    assert {place: n for place, n in lengths.items() if n > FUNCTION_LINES_MAX} == {}


def test_a_function_has_at_most_five_parameters() -> None:
    """Where five do not suffice, some of them are one value. A command's parameters are flags."""
    crowded = {}
    for module in MODULES:
        for one in functions(module):
            places = [*one.args.posonlyargs, *one.args.args]
            if places and places[0].arg in ("self", "cls"):
                places = places[1:]
            count = len(places) + len(one.args.kwonlyargs)
            is_free = "cli" in module.parts or one.name in COMPOSED
            if not is_free and count > PARAMETERS_MAX:
                crowded[place_of(module, one)] = count
    assert crowded == {}


def test_a_module_opens_by_saying_what_it_is_for() -> None:
    silent = [module for module in MODULES if not ast.get_docstring(ast.parse(module.read_text()))]
    assert [module.name for module in silent] == ["__main__.py"]
