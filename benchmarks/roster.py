"""Who is compared: peers in environments of their own, outside of the repository, and how each starts.

Run: python -m benchmarks.roster [PEER ...], to make the environments from the package index. A peer's
packages never meet ours: several need versions that exclude each other.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from benchmarks.harness import Target, free_port, wait_until_ready

from trivec.core.types import Float32Array

ROOT = Path(__file__).parents[1]
ENVS = Path("~/.cache/trivec-bench/envs").expanduser()
TORCH = "torch==2.13.0"

# Exact versions, so that a comparison can be repeated; torch takes its CPU build where the index has it.
REQUIREMENTS: Mapping[str, Sequence[str]] = MappingProxyType(
    {
        "sentence-transformers": (TORCH, "sentence-transformers==6.2.0"),
        "flagembedding": (TORCH, "FlagEmbedding==1.4.2"),
        "onnxruntime": (TORCH, "transformers==5.23.0", "onnx==1.23.2", "onnxruntime==1.32.0"),
        "ctranslate2": (TORCH, "transformers==4.57.6", "ctranslate2==4.8.5"),
        "infinity": (TORCH, "infinity-emb[server,torch]==0.0.78"),
    }
)
# Kind of `benchmarks.peer`, its precision, and its environment; None: ours.
PEERS: Mapping[str, tuple[str, str, str | None]] = MappingProxyType(
    {
        "trivec-int8": ("trivec", "int8", None),
        "trivec-fp32": ("trivec", "fp32", None),
        "sentence-transformers": ("sentence_transformers", "fp32", "sentence-transformers"),
        "flagembedding": ("flagembedding", "fp32", "flagembedding"),
        "onnxruntime-fp32": ("onnxruntime", "fp32", "onnxruntime"),
        "onnxruntime-int8": ("onnxruntime", "int8", "onnxruntime"),
        "ctranslate2-int8": ("ctranslate2", "int8", "ctranslate2"),
    }
)
CLS_ONLY = {"flagembedding"}  # takes the first token's state, whatever the model was trained for

# Nothing of a peer may reach for a hub or report home while it is measured.
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "true",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
}


class PeerFailed(Exception):
    """A peer is not here, did not load, or ended; the message is one line."""


@dataclass(frozen=True, slots=True)
class Stage:
    """What every peer is given: the same folder of weights, and where it may keep conversions."""

    model_dir: Path
    pooling: str  # cls, mean or last
    work_dir: Path  # conversions and logs
    envs: Path = ENVS
    ovms_model: Path | None = None  # a folder that OpenVINO Model Server's own tool has exported

    def python_of(self, environment: str | None) -> Path:
        """The interpreter of *environment*. Raises `PeerFailed` where it has not been made."""
        if environment is None:
            return Path(sys.executable)
        python = self.envs / environment / "bin" / "python"
        if not python.exists():
            raise PeerFailed(f"not here: python -m benchmarks.roster {environment} makes it")
        return python


@dataclass(frozen=True, slots=True)
class Timed:
    """One answer: how long all texts took, and the first few vectors for a look."""

    seconds: float
    vectors: Float32Array  # [a few texts, dimensions]


class Process:
    """A module that answers JSON lines, in an environment's interpreter; close it."""

    def __init__(self, module: str, *arguments: str, python: Path, log: Path) -> None:
        """Blocks until it is loaded. Raises `PeerFailed`."""
        self._log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as out:
            self._process = subprocess.Popen(
                [python, "-m", module, *arguments],
                cwd=ROOT, env={**os.environ, **OFFLINE}, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=out,
            )  # fmt: skip
        self._read()

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        """One question, one answer; blocks. Raises `PeerFailed`."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # what it said last is read below
        return self._read()

    def embed(self, texts: Sequence[str]) -> Timed:
        answer = self.ask({"texts": list(texts)})
        return Timed(answer["seconds"], np.array(answer["vectors"], np.float32))

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            lines = self._log.read_text(errors="replace").strip().splitlines()
            raise PeerFailed(f"ended: {lines[-1] if lines else 'without a word'}; see {self._log}")
        answer: dict[str, Any] = json.loads(line)
        if "failed" in answer:
            raise PeerFailed(f"{answer['failed'].splitlines()[0]}; see {self._log}")
        return answer


def start(name: str, stage: Stage) -> Process:
    """The peer *name*, loaded. Raises `PeerFailed`."""
    kind, precision, environment = PEERS[name]
    work = stage.work_dir / (environment or "ours")
    arguments = (kind, str(stage.model_dir), stage.pooling, precision, str(work))
    python, log = stage.python_of(environment), stage.work_dir / f"{name}.log"
    return Process("benchmarks.peer", *arguments, python=python, log=log)


@dataclass(frozen=True, slots=True)
class PeerServer:
    """A server with OpenAI's route: its command, the route's prefix, and where it says it is ready."""

    command: str  # its defaults for a CPU, and its own speed-up where it has one
    prefix: str
    ready: str

    def words(self, stage: Stage, port: int) -> list[str]:
        """The command as it is started. Raises `PeerFailed`."""
        program, *options = self.command.split()
        if program == "infinity_emb":
            found: str | None = str(stage.python_of("infinity").with_name(program))
        else:
            found = shutil.which(program)
        if found is None:
            raise PeerFailed(f"not here: no {program} on the PATH")
        if "{ovms_model}" in options and stage.ovms_model is None:
            raise PeerFailed("left out: --ovms-model names a folder that its own tool has exported")
        facts = {name: getattr(stage, name) for name in ("model_dir", "pooling", "ovms_model")}
        return [found, *(option.format(port=port, **facts) for option in options)]


SERVERS: Mapping[str, PeerServer] = MappingProxyType(
    {
        "infinity": PeerServer(
            "infinity_emb v2 --model-id {model_dir} --served-model-name peer --engine torch "
            "--device cpu --host 127.0.0.1 --port {port}", "", "/health",
        ),
        "text-embeddings-inference": PeerServer(
            "text-embeddings-router --model-id {model_dir} --served-model-name peer "
            "--pooling {pooling} --hostname 127.0.0.1 --port {port}", "/v1", "/health",
        ),
        "openvino-model-server": PeerServer(
            "ovms --rest_port {port} --rest_bind_address 127.0.0.1 --model_name peer "
            "--model_path {ovms_model}", "/v3", "/v2/health/ready",
        ),
    }
)  # fmt: skip


@contextmanager
def serving(name: str, stage: Stage) -> Iterator[Target]:
    """The peer's server until the block ends. Raises `PeerFailed`, `ServerFailed`."""
    server, port, log = SERVERS[name], free_port(), stage.work_dir / f"{name}.log"
    command = server.words(stage, port)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as out:
        process = subprocess.Popen(command, env={**os.environ, **OFFLINE}, stdout=out, stderr=out)
    try:
        base = f"http://127.0.0.1:{port}"
        wait_until_ready(base, process, log, path=server.ready)
        yield Target(f"{base}{server.prefix}", "peer", None)
    finally:
        process.terminate()
        process.wait(60)


def make(name: str, envs: Path) -> Path:
    """Make the environment of *name* unless it is there already; its folder."""
    folder, done = envs / name, envs / name / ".complete"
    if not done.exists():
        print(f"making {folder}", file=sys.stderr)
        venv.create(folder, with_pip=True, clear=True)
        pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, *REQUIREMENTS[name]], check=True)
        done.touch()
    return folder


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--envs", type=Path, default=ENVS, help="folder of the environments")
    arguments.add_argument("peers", nargs="*", metavar="PEER", help=", ".join(REQUIREMENTS))
    given = arguments.parse_args()
    if unknown := set(given.peers) - set(REQUIREMENTS):
        arguments.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(REQUIREMENTS)}")
    for name in given.peers or REQUIREMENTS:
        print(make(name, given.envs))


if __name__ == "__main__":
    main()
