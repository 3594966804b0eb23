"""Cache: a model's int8 tensors kept on disk beside their certificate, so that a start is quick.

A folder a checkpoint and set of versions: `tensors.safetensors`, then `quantised.json` with its hash
and the certificate, each written whole under another name and moved into place. A folder that is
damaged is made again; a hash once computed is remembered beside the files as long as they stay as
they are.
"""

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from safetensors.numpy import save_file

from trivec.backends.openvino.calibrate import Agreement, Certificate, QuantisedModel
from trivec.backends.openvino.quantise import Form, QuantConfig
from trivec.backends.openvino.session import open_core
from trivec.checkpoints.checkpoint import Checkpoint
from trivec.checkpoints.hashes import Hashes
from trivec.core.errors import CheckpointRefused

_log = logging.getLogger("trivec.openvino")

FORMAT = 4
"""Raised whenever the same checkpoint would give other tensors, or another graph would read them."""

TENSORS, DESCRIBED = "tensors.safetensors", "quantised.json"
REFERENCE = "self_test."  # begins the names of the tensors that are `QuantisedModel.references`

DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError, CheckpointRefused)
"""What reading a damaged folder raises."""

DTYPES = {"F32": np.float32, "I8": np.int8}


def cache_folder(checkpoint: Checkpoint, *, precision: str, cache_dir: Path) -> Path:
    """Where the quantised *checkpoint* for this machine and these versions is kept.

    The CPU and what it can do decide the kernels, which were tried and certified.
    """
    core = open_core()
    processor = [
        core.get_property("CPU", "FULL_DEVICE_NAME"),
        *sorted(core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")),
    ]
    key = "|".join([checkpoint.digest, str(FORMAT), ov.get_version(), precision, *processor])
    return cache_dir / "openvino" / hashlib.sha256(key.encode()).hexdigest()[:24]


def save(folder: Path, model: QuantisedModel) -> None:
    """Write tensors and certificate; a crash in between leaves nothing that `load` takes."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / TENSORS
    references = {REFERENCE + name: states for name, states in model.references.items()}
    tensors = {**model.tensors, **references}
    _replace(file, lambda path: save_file(tensors, path))
    hashes = Hashes(folder)
    sha256 = hashes.of(file, fresh=True).sha256
    hashes.remember(file, sha256)  # which trusts no file so young but from its writer
    config = {
        "form": model.config.form.value,
        "group_size": model.config.group_size,
        "exact_layers": sorted(model.config.exact_layers),
        "bf16_attention": model.config.bf16_attention,
    }
    described = {"sha256": sha256, "config": config, "certificate": asdict(model.certificate)}
    text = json.dumps(described, indent=1)
    _replace(folder / DESCRIBED, lambda path: path.write_text(text, "utf-8"))


def load(folder: Path) -> QuantisedModel | None:
    """What `save` wrote to *folder*; None where there is nothing, or something is damaged."""
    if not (folder / DESCRIBED).exists():
        return None
    try:
        return _read(folder, fresh=False)
    except DAMAGE as fault:
        _log.warning("the prepared model in %s is damaged and is made again: %s", folder, fault)
        return None


def check_cache(cache_dir: Path) -> dict[Path, str | None]:
    """Every quantised model under *cache_dir*, read whole: what is wrong with it, or None."""
    found: dict[Path, str | None] = {}
    for described in sorted((cache_dir / "openvino").glob(f"*/{DESCRIBED}")):
        found[described.parent] = None
        try:
            _read(described.parent, fresh=True)
        except DAMAGE as fault:
            found[described.parent] = str(fault)
    return found


def _read(folder: Path, *, fresh: bool) -> QuantisedModel:
    """Raises one of `DAMAGE`. *fresh*: hash every byte, whatever is remembered."""
    described = json.loads((folder / DESCRIBED).read_text("utf-8"))
    file = folder / TENSORS
    if Hashes(folder).of(file, fresh=fresh).sha256 != described["sha256"]:
        raise ValueError(f"the hash of {file.name} is another than when it was written")
    config, certificate = described["config"], described["certificate"]
    tensors = map_tensors(file)
    references = {
        name.removeprefix(REFERENCE): np.array(tensors.pop(name), np.float32)
        for name in list(tensors)
        if name.startswith(REFERENCE)
    }
    return QuantisedModel(
        QuantConfig(
            Form(config["form"]),
            config["group_size"],
            frozenset(config["exact_layers"]),
            bf16_attention=config["bf16_attention"],
        ),
        Certificate(
            config=certificate["config"],
            agreements={name: Agreement(**one) for name, one in certificate["agreements"].items()},
            probe_count=certificate["probe_count"],
            script_count=certificate["script_count"],
            refused=tuple(certificate["refused"]),
        ),
        tensors,
        references,
    )


def map_tensors(file: Path) -> dict[str, NDArray[np.generic]]:
    """Every tensor of a safetensors file as a read-only view of the mapped file."""
    raw = np.memmap(file, np.uint8, mode="r")
    header_bytes = int.from_bytes(raw[:8].tobytes(), "little")
    header = json.loads(raw[8 : 8 + header_bytes].tobytes())
    header.pop("__metadata__", None)
    body = raw[8 + header_bytes :]
    return {
        name: body[slice(*entry["data_offsets"])]
        .view(DTYPES[entry["dtype"]])
        .reshape(entry["shape"])
        for name, entry in header.items()
    }


def _replace(file: Path, write: Callable[[Path], object]) -> None:
    """Let *write* fill a neighbour of *file*, flush it to disk and move it into place."""
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    os.close(handle)
    path = Path(name)
    try:
        write(path)
        with path.open("rb") as written:
            os.fsync(written.fileno())
        path.replace(file)
    finally:
        path.unlink(missing_ok=True)
