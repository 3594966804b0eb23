"""What must never be committed: a host of a package index, a path of one machine, a big file."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILE_BYTES_MAX = 2 * 1024 * 1024
INDEX = re.compile(
    r"--?(extra-)?index-url|--find-links|\"resolved\": *\"https?:|https?://\S+/simple\b"
)
ONE_MACHINE = re.compile(r"(?<![\w.])/(work|home/[a-z]\w*|Users/\w+)/\w")


def committed() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("this tree is no git checkout")
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def lines_matching(pattern: re.Pattern[str]) -> list[str]:
    """As `file:line`, for every committed file but this one and the script that refuses hosts."""
    ours = {Path(__file__).resolve(), ROOT / "scripts" / "lock.py"}
    found = []
    for file in committed():
        if file in ours:
            continue
        for number, line in enumerate(file.read_text("utf-8", "replace").splitlines(), 1):
            if pattern.search(line):
                found.append(f"{file.relative_to(ROOT)}:{number}: {line.strip()[:120]}")
    return found


def test_nothing_names_a_package_index() -> None:
    assert lines_matching(INDEX) == []


def test_nothing_names_a_path_of_one_machine() -> None:
    assert lines_matching(ONE_MACHINE) == []


def test_no_file_is_over_two_mebibytes() -> None:
    assert [str(file) for file in committed() if file.stat().st_size > FILE_BYTES_MAX] == []


@pytest.mark.parametrize(
    "name",
    ["serve", "test", "check", "clients", "cluster", "apart", "weaviate", "docs", "reference"],
)
def test_every_pin_is_exact_and_hashed(name: str) -> None:
    text = (ROOT / "requirements" / f"{name}.txt").read_text("utf-8")
    logical = text.replace("\\\n", " ").splitlines()
    pins = [line for line in logical if line and not line.startswith("#")]
    assert pins
    assert [pin for pin in pins if not re.match(r"[\w.-]+==\S+ .*--hash=sha256:", pin)] == []


def test_the_runtime_never_asks_for_torch_or_a_telemetry_client() -> None:
    text = (ROOT / "requirements" / "serve.txt").read_text("utf-8")
    assert not re.search(r"^(torch|openvino-telemetry|nvidia|triton)\b", text, re.MULTILINE)
