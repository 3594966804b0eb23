"""Who is compared: each peer's environment, module and arguments, as a table."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from benchmarks.against.environments import python_of
from benchmarks.against.peer import Peer


@dataclass(frozen=True, slots=True)
class Stage:
    """What every peer is given: the same folder of weights, and where it may keep conversions."""

    model_dir: Path
    pooling: str  # cls or mean
    work_dir: Path  # conversions and logs
    envs: Path


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the table: *arguments* are made from the stage."""

    environment: str | None  # None: this very interpreter
    module: str
    arguments: Callable[[Stage], tuple[str, ...]]

    def start(self, name: str, stage: Stage) -> Peer:
        python = Path(sys.executable)
        if self.environment is not None:
            python = python_of(self.environment, stage.envs)
        stage.work_dir.mkdir(parents=True, exist_ok=True)
        log = stage.work_dir / f"{name}.log"
        return Peer(self.module, *self.arguments(stage), python=python, log=log)


def _folder(stage: Stage) -> tuple[str, ...]:
    return (str(stage.model_dir),)


def _ours(precision: str) -> Callable[[Stage], tuple[str, ...]]:
    return lambda stage: (f"bench={stage.model_dir}", precision)


def _converted(kind: str, precision: str) -> Callable[[Stage], tuple[str, ...]]:
    return lambda stage: (
        str(stage.model_dir),
        stage.pooling,
        precision,
        str(stage.work_dir / kind),
    )


ROSTER = MappingProxyType(
    {
        "trivec-int8": Entry(None, "trivec", _ours("int8")),
        "trivec-fp32": Entry(None, "trivec", _ours("fp32")),
        "sentence-transformers": Entry("sentence-transformers", "sentence_transformers", _folder),
        "flagembedding": Entry("flagembedding", "flagembedding", _folder),
        "onnxruntime-fp32": Entry("onnxruntime", "onnxruntime", _converted("onnx", "fp32")),
        "onnxruntime-int8": Entry("onnxruntime", "onnxruntime", _converted("onnx", "int8")),
        "ctranslate2-int8": Entry("ctranslate2", "ctranslate2", _converted("ct2", "int8")),
        "llama-cpp-q8_0": Entry("llama-cpp", "llama_cpp", _converted("gguf", "q8_0")),
    }
)
