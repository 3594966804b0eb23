"""Cache: a model's int8 tensors kept on disk beside their certificate, so that a start is quick.

A folder for each checkpoint, set of versions and CPU: `tensors.safetensors`, then `quantised.json`
with its hash and the certificate, each moved into place when it is whole. The tensors are written
before they are judged, and judged as they are mapped from there. A folder that is damaged is made
again; a hash once computed is remembered beside the files as long as they stay as they are.
"""

import hashlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import numpy as np
import openvino as ov

from trivec.backends.openvino.calibrate import Certificate, QuantisedModel
from trivec.backends.openvino.quantise import QuantScheme, Tensors
from trivec.backends.openvino.session import open_core
from trivec.backends.openvino.trial import kernel_flags
from trivec.checkpoints.checkpoint import Checkpoint
from trivec.checkpoints.hashes import Hashes
from trivec.checkpoints.tensor_files import open_tensor_file, remove_unfinished, write_safetensors
from trivec.core.errors import CheckpointRefused, SettingInvalid
from trivec.core.ports import OnProgress, no_progress

_log = logging.getLogger("trivec.openvino")

FORMAT = 9
"""Raised whenever the same checkpoint would give other tensors, or another graph would read them."""

TENSORS, DESCRIBED = "tensors.safetensors", "quantised.json"
DTYPES = {"F32": np.float32, "I8": np.int8}

DAMAGE = (OSError, ValueError, KeyError, msgspec.MsgspecError, CheckpointRefused)
"""What reading a damaged folder raises."""


class Described(msgspec.Struct, frozen=True):
    """The content of `quantised.json`."""

    sha256: str  # of the tensors' file
    certificate: Certificate
    hidden_size: int
    references: dict[str, bytes]  # of `QuantisedModel`, each float32 [tokens, hidden size]


def cache_folder(checkpoint: Checkpoint, *, precision: str, cache_dir: Path) -> Path:
    """Where the quantised *checkpoint* for this machine and these versions is kept.

    The CPU and what it can do decide the kernels, which were tried and certified.
    """
    core = open_core()
    processor = [
        core.get_property("CPU", "FULL_DEVICE_NAME"),
        *sorted(core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")),
        *kernel_flags(),
    ]
    key = "|".join([checkpoint.digest, str(FORMAT), ov.get_version(), precision, *processor])
    return cache_dir / "openvino" / hashlib.sha256(key.encode()).hexdigest()[:24]


class CacheWriter:
    """Writes one folder: tensors as they are made, then what proves the last of them sound."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        # Of our own tensors: another process may have put others there meanwhile, and then what is
        # saved fits neither and is made again.
        self._sha256 = ""

    def keep(self, tensors: Tensors) -> Tensors:
        """*tensors* as they are in the folder from now on; nothing that `load` takes, before `save`.

        Raises `SettingInvalid` where they cannot be written.
        """
        tensors = dict(  # int8 last, so that each float32 begins at a multiple of its size
            sorted(tensors.items(), key=lambda item: -item[1].itemsize)
        )
        names = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
        shapes = {name: (names[array.dtype], array.shape) for name, array in tensors.items()}
        pieces = ([array.data.cast("B")] for array in tensors.values())
        file = self._folder / TENSORS
        with self._write_faults():
            self._sha256 = write_safetensors(file, shapes, pieces)
            Hashes(self._folder).remember(file, self._sha256)
            return _mapped(file)

    def save(self, model: QuantisedModel) -> None:
        """Let *model*, whose tensors were kept last, be loaded. Raises `SettingInvalid`."""
        references = {name: states.tobytes() for name, states in model.references.items()}
        hidden_size = next(iter(model.references.values())).shape[1]
        described = Described(self._sha256, model.certificate, hidden_size, references)
        unfinished = self._folder / f".{DESCRIBED}.{os.getpid()}.part"
        with self._write_faults():
            unfinished.write_bytes(msgspec.json.encode(described))
            unfinished.replace(self._folder / DESCRIBED)

    @contextmanager
    def _write_faults(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise SettingInvalid(
                f"the int8 tensors cannot be written to {self._folder}: {error}. Give the data "
                "folder space and permission, or serve with --precision fp32."
            ) from error


def load(folder: Path, on_progress: OnProgress = no_progress) -> QuantisedModel | None:
    """What `save` wrote to *folder*; None where there is nothing, or something is damaged.

    Tensors without a certificate, of a process that was killed, are where the next are written.
    """
    remove_unfinished(folder / TENSORS)
    if not (folder / DESCRIBED).exists():
        return None
    try:
        return _read(folder, on_progress, fresh=False)
    except DAMAGE as fault:
        _log.warning("the prepared model in %s is damaged and is made again: %s", folder, fault)
        return None


def check_cache(cache_dir: Path, on_progress: OnProgress = no_progress) -> dict[Path, str | None]:
    """Every quantised model under *cache_dir*, read whole: what is wrong with it, or None."""
    found: dict[Path, str | None] = {}
    for described in sorted((cache_dir / "openvino").glob(f"*/{DESCRIBED}")):
        found[described.parent] = None
        try:
            _read(described.parent, on_progress, fresh=True)
        except DAMAGE as fault:
            found[described.parent] = str(fault)
    return found


def _read(folder: Path, on_progress: OnProgress, *, fresh: bool) -> QuantisedModel:
    """Raises one of `DAMAGE`. *fresh*: hash every byte, whatever is remembered."""
    described = msgspec.json.decode((folder / DESCRIBED).read_bytes(), type=Described)
    certificate, file = described.certificate, folder / TENSORS
    hashes = Hashes(folder, on_progress=on_progress)
    if hashes.of(file, fresh=fresh).sha256 != described.sha256:
        raise ValueError(f"the hash of {file.name} is another than when it was written")
    scheme = QuantScheme.of_name(certificate.scheme)
    if scheme is None:
        raise ValueError(f"{certificate.scheme} is no int8 scheme")
    references = {
        name: np.frombuffer(states, np.float32).reshape(-1, described.hidden_size)
        for name, states in described.references.items()
    }
    return QuantisedModel(scheme, certificate, _mapped(file), references)


def _mapped(file: Path) -> Tensors:
    opened = open_tensor_file(file)
    return {
        name: np.frombuffer(opened.raw(name), DTYPES[stored.dtype]).reshape(stored.shape)
        for name, stored in opened.tensors.items()
    }
