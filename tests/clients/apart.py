"""Programs for the environment of clients that want other versions than ours, or are large."""

import subprocess
from pathlib import Path

import pytest

PYTHON = Path(__file__).resolve().parents[2] / ".venv-apart" / "bin" / "python"


def run_apart(program: str, *arguments: str, folder: Path, **environment: str) -> str:
    """What the Python *program*, its text, prints there; started in *folder*."""
    if not PYTHON.exists():
        pytest.skip("the environment comes with: make test-clients")
    run = subprocess.run(
        [str(PYTHON), "-c", program, *arguments],
        cwd=folder,
        env={"HOME": str(folder), "PATH": "/usr/bin:/bin", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout
