"""Benchmarks are one small harness: what is added takes something away."""

from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
LINES_MAX = 2_500  # raw lines of all Python files, subfolders included, but for
SIMULATION = "simulation.py"  # which measures nothing of this machine


def test_the_benchmarks_keep_to_their_budget() -> None:
    files = [file for file in BENCHMARKS.rglob("*.py") if file.name != SIMULATION]
    lines = {file: len(file.read_text("utf-8").splitlines()) for file in files}
    assert sum(lines.values()) <= LINES_MAX, sorted(lines.items(), key=lambda one: -one[1])
