"""The int8 tensors of a model kept on disk beside their certificate, so that a start is quick.

A folder a checkpoint and set of versions: `tensors.safetensors`, then `prepared.json` with its hash
and the certificate, each written whole under another name and moved into place. What does not
match is made again; a hash once computed is remembered beside them as long as the file stays as it is
(decision 0021). It knows files; not what is computed.
"""

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from safetensors.numpy import save_file

from trivec.backends.openvino.certificate import Agreement, Certificate
from trivec.backends.openvino.plugin import open_core
from trivec.backends.openvino.recipe import Form, Recipe
from trivec.checkpoints.checkpoint import Checkpoint
from trivec.checkpoints.hashes import Hashes
from trivec.core.errors import CheckpointRefused

_log = logging.getLogger("trivec.openvino")

SCHEME = 3
"""Raised whenever the same checkpoint would give other tensors, or another graph would read them."""

DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError, CheckpointRefused)
"""What reading a damaged folder raises."""

DTYPES = {"F32": np.float32, "I8": np.int8}


@dataclass(frozen=True, slots=True)
class Prepared:
    """A model ready to be compiled."""

    recipe: Recipe
    certificate: Certificate
    tensors: Mapping[str, NDArray[np.generic]]  # read-only views of the mapped file


def prepared_folder(checkpoint: Checkpoint, *, precision: str, cache_dir: Path) -> Path:
    """Where the prepared form of *checkpoint* for this machine and these versions is kept."""
    made_by = "|".join([str(SCHEME), ov.get_version(), precision, *_processor()])
    key = hashlib.sha256(f"{checkpoint.digest}|{made_by}".encode()).hexdigest()[:24]
    return cache_dir / "openvino" / key


def _processor() -> list[str]:
    """The CPU and what it can do: that decides the kernels, which were tried and certified."""
    core = open_core()
    name: str = core.get_property("CPU", "FULL_DEVICE_NAME")
    return [name, *sorted(core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"))]


def save(
    folder: Path,
    recipe: Recipe,
    certificate: Certificate,
    tensors: Mapping[str, NDArray[np.generic]],
) -> None:
    """Write tensors and certificate; a crash in between leaves nothing that `load` takes."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "tensors.safetensors"
    _replace(file, lambda path: save_file(dict(tensors), path))
    hashes = Hashes(folder)
    sha256 = hashes.of(file, fresh=True).sha256
    hashes.remember(file, sha256)  # too young to be trusted, but for who wrote it
    described = {
        "sha256": sha256,
        "recipe": {
            "form": recipe.form.value,
            "group_size": recipe.group_size,
            "exact_layers": sorted(recipe.exact_layers),
            "bf16_attention": recipe.bf16_attention,
        },
        "certificate": asdict(certificate),
    }
    text = json.dumps(described, indent=1)
    _replace(folder / "prepared.json", lambda path: path.write_text(text, "utf-8"))


def load(folder: Path) -> Prepared | None:
    """What `save` wrote to *folder*; None where there is nothing, or something is damaged."""
    if not (folder / "prepared.json").exists():
        return None
    try:
        return _read(folder, fresh=False)
    except DAMAGE as fault:
        _log.warning("the prepared model in %s is damaged and is made again: %s", folder, fault)
        return None


def check_all(cache_dir: Path) -> dict[Path, str | None]:
    """Every prepared model under *cache_dir*, read whole: what is wrong with it, or None."""
    found: dict[Path, str | None] = {}
    for described in sorted((cache_dir / "openvino").glob("*/prepared.json")):
        try:
            _read(described.parent, fresh=True)
        except DAMAGE as fault:
            found[described.parent] = str(fault)
        else:
            found[described.parent] = None
    return found


def _read(folder: Path, *, fresh: bool) -> Prepared:
    """Raises one of `DAMAGE`. *fresh*: hash every byte, whatever is remembered."""
    described = json.loads((folder / "prepared.json").read_text("utf-8"))
    file = folder / "tensors.safetensors"
    if Hashes(folder).of(file, fresh=fresh).sha256 != described["sha256"]:
        raise ValueError(f"the hash of {file.name} is another than when it was written")
    recipe, certificate = _recipe(described["recipe"]), _certificate(described["certificate"])
    return Prepared(recipe, certificate, map_tensors(file))


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


def _recipe(kept: dict[str, Any]) -> Recipe:
    return Recipe(
        Form(kept["form"]),
        kept["group_size"],
        frozenset(kept["exact_layers"]),
        bf16_attention=kept["bf16_attention"],
    )


def _certificate(kept: dict[str, Any]) -> Certificate:
    agreements = {
        kind: Agreement(**kept[kind]) if kept[kind] is not None else None
        for kind in ("dense", "sparse", "multi")
    }
    dense = agreements["dense"]
    if dense is None:
        raise ValueError("a certificate without dense vectors")
    return Certificate(
        recipe=kept["recipe"],
        dense=dense,
        sparse=agreements["sparse"],
        multi=agreements["multi"],
        probe_count=kept["probe_count"],
        script_count=kept["script_count"],
        refused=tuple(kept["refused"]),
    )
