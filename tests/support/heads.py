"""Tiny checkpoints with a head, in transformers' own layout, written without it."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file
from tests.checkpoints.tiny import write_tiny

HIDDEN, VOCABULARY_SIZE = 128, 2000


def write_classifier(folder: Path, *, family: str = "bert", labels: int = 1) -> Path:
    """A cross-encoder with seeded weights; its scores of different pairs are well apart."""
    first, last = ("pooler.dense", "classifier")
    if family != "bert":
        first, last = ("classifier.dense", "classifier.out_proj")
    names = {"bert": "Bert", "roberta": "Roberta", "xlm-roberta": "XLMRoberta"}
    tensors = _linear(first, HIDDEN, HIDDEN) | _linear(last, labels, HIDDEN)
    return _write(folder, family, f"{names[family]}ForSequenceClassification", tensors)


def write_masked_lm(folder: Path) -> Path:
    """A masked language model as SPLADE has it, its LayerNorms with their first names."""
    transform = "cls.predictions.transform"
    tensors = _linear(f"{transform}.dense", HIDDEN, HIDDEN) | {
        f"{transform}.LayerNorm.gamma": np.ones(HIDDEN, np.float32),
        f"{transform}.LayerNorm.beta": np.full(HIDDEN, -0.1, np.float32),
        "cls.predictions.bias": np.full(VOCABULARY_SIZE, -1.5, np.float32),
    }
    return _write(folder, "bert", "BertForMaskedLM", tensors)


def add_module(folder: Path, kind: str, settings: object, **tensors: np.ndarray) -> None:
    """Append a module to the `modules.json` of *folder*, with its config and weights."""
    file = folder / "modules.json"
    modules = json.loads(file.read_text())
    path = f"{len(modules)}_{kind}"
    modules.append({"type": f"sentence_transformers.models.{kind}", "path": path})
    file.write_text(json.dumps(modules))
    (folder / path).mkdir()
    (folder / path / "config.json").write_text(json.dumps(settings))
    if tensors:
        save_file(tensors, folder / path / "model.safetensors")


def _linear(name: str, size: int, width: int) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(len(name))
    weight = draw.standard_normal((size, width), np.float32) * np.float32(2 * width**-0.5)
    return {f"{name}.weight": weight, f"{name}.bias": draw.standard_normal(size, np.float32) / 10}


def _write(folder: Path, family: str, name: str, tensors: dict[str, np.ndarray]) -> Path:
    write_tiny(folder, family=family, hidden=HIDDEN, heads=False, position_count=700)
    for file in ("modules.json", "1_Pooling/config.json"):
        (folder / file).unlink()
    config = json.loads((folder / "config.json").read_text()) | {"architectures": [name]}
    (folder / "config.json").write_text(json.dumps(config))
    weights = folder / "model.safetensors"
    save_file(dict(load_file(weights)) | tensors, weights)
    return folder
