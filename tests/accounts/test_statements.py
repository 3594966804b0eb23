"""Nothing is ever built into a statement: no formatted text reaches `execute` or `text`.

A key look-up that joined what a client had sent into SQL was exploited within a day and a half of
being known (CVE-2026-42208). Here it cannot be written without this test failing.
"""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "src" / "trivec"
RUNS_SQL = {
    "execute",
    "executemany",
    "executescript",
    "exec_driver_sql",
    "scalar",
    "scalars",
    "text",
}


def calls(tree: ast.AST) -> list[ast.Call]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


def name_of(call: ast.Call) -> str:
    match call.func:
        case ast.Attribute(attr=name) | ast.Name(id=name):
            return name
        case _:
            return ""


def is_built(node: ast.AST) -> bool:
    """Whether text is put together: f"", +, %, .format(), .join(), .replace()."""
    match node:
        case ast.JoinedStr():
            return True
        case ast.BinOp(left=left, op=ast.Add() | ast.Mod(), right=right):
            return any(
                isinstance(side, ast.JoinedStr | ast.BinOp)
                or (isinstance(side, ast.Constant) and isinstance(side.value, str))
                for side in (left, right)
            )
        case ast.Call():
            return name_of(node) in {"format", "join", "replace", "format_map", "Template"}
        case _:
            return False


def offences(source: str) -> list[int]:
    """Lines where a statement is built."""
    return [
        call.lineno
        for call in calls(ast.parse(source))
        if name_of(call) in RUNS_SQL and any(is_built(argument) for argument in call.args)
    ]


@pytest.mark.parametrize(
    "file", sorted(SOURCE.rglob("*.py")), ids=lambda file: str(file.relative_to(SOURCE))
)
def test_no_statement_is_built(file: Path) -> None:
    assert offences(file.read_text("utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        'c.execute(f"SELECT {x}")',
        'c.execute("SELECT " + x)',
        'c.execute("SELECT %s" % x)',
        'c.execute(text("SELECT {}".format(x)))',
        'c.exec_driver_sql(" ".join(x))',
    ],
)
def test_the_test_itself_finds(source: str) -> None:
    assert offences(source) == [1]
