"""A peer's process as seen from here: started in its own environment, asked in turn, ended.

Between two questions a peer waits on its input, so several may be loaded at once and take turns.
"""

import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from trivec.core.types import Float32Array

ROOT = Path(__file__).parents[2]

# Nothing of a peer may reach for a hub or report home while it is measured.
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "true",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
}


class PeerFailed(Exception):
    """A peer's process ended or does not answer; its own words are in the log."""


@dataclass(frozen=True, slots=True)
class Timed:
    """One answer: how long all texts took, and the first few vectors for a look."""

    seconds: float
    vectors: Float32Array  # [a few texts, dimensions]


class Peer:
    """A module of `benchmarks.against.peers` in an environment's interpreter; a context manager."""

    def __init__(self, module: str, *arguments: str, python: Path, log: Path) -> None:
        self.name = module
        self._log = log
        self._out = log.open("wb")
        self._process = subprocess.Popen(
            [python, "-m", f"benchmarks.against.peers.{module}", *arguments],
            cwd=ROOT,
            env={**os.environ, **OFFLINE},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._out,
            text=True,
        )

    def __enter__(self) -> Self:
        self._read()  # it says when it is loaded
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._out.close()

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        """One question, one answer; blocks. Raises `PeerFailed`."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError as gone:
            raise PeerFailed(self._last_words()) from gone
        return self._read()

    def embed(self, texts: Sequence[str]) -> Timed:
        answer = self.ask({"texts": list(texts)})
        return Timed(answer["seconds"], np.array(answer["vectors"], np.float32))

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise PeerFailed(self._last_words())
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _last_words(self) -> str:
        return f"{self.name} ended:\n{self._log.read_text(errors='replace')[-2000:]}"
