"""Storeys: who may import whom, and that asking for help loads nothing heavy."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("openvino", "torch", "numpy", "starlette", "granian", "sqlalchemy", "tokenizers")


def test_imports_run_downward_only() -> None:
    pytest.importorskip("importlinter", reason="import-linter comes with: make check")
    run = subprocess.run(
        [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout


@pytest.mark.parametrize(
    ("arguments", "heavy"),
    [
        pytest.param(["--help"], ("pydantic", *HEAVY), id="help"),
        pytest.param(["--version"], ("pydantic", *HEAVY), id="version"),
        pytest.param(["serve", "--help"], HEAVY, id="serve-help"),
    ],
)
def test_asking_for_help_loads_nothing_heavy(arguments: list[str], heavy: tuple[str, ...]) -> None:
    script = (
        "import sys\n"
        "from trivec.cli import main\n"
        f"sys.argv = ['trivec', *{arguments!r}]\n"
        "try:\n"
        "    main()\n"
        "except SystemExit:\n"
        "    pass\n"
        f"print('loaded:', *sorted(set({heavy!r}) & set(sys.modules)))\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert run.stdout.splitlines()[-1].strip() == "loaded:"


def test_the_core_imports_only_the_standard_library_and_numpy() -> None:
    script = (
        "import sys, pkgutil, importlib, trivec.core\n"
        "before = set(sys.modules)\n"
        "for found in pkgutil.iter_modules(trivec.core.__path__):\n"
        "    importlib.import_module('trivec.core.' + found.name)\n"
        "tops = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(*sorted(tops - set(sys.stdlib_module_names) - {'trivec', 'numpy'}))\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == ""
