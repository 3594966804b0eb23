"""Torch files made into safetensors, once: the cache then holds plain arrays and no pickle."""

from collections.abc import Iterator
from pathlib import Path

from trivec.checkpoints.hashes import HashedFile, Hashes
from trivec.checkpoints.safetensors_file import write_safetensors
from trivec.checkpoints.tensors import MappedTensors
from trivec.checkpoints.torch_file import open_torch_file

PIECE_BYTES = 16 * 1024 * 1024


def converted(source: HashedFile, *, cache_dir: Path) -> Path:
    """The safetensors form of the torch file *source*, from the cache or made now.

    A copy in the cache counts only while it has the hash it was written with; a damaged one is
    made again. Memory: what the kernel maps of *source*, and one buffer.
    Raises `CheckpointRefused` when *source* is not a plain state dict.
    """
    folder = cache_dir / "converted" / source.sha256
    file, note = folder / "model.safetensors", folder / "sha256"
    hashes = Hashes(cache_dir / "hashes")
    if file.is_file() and note.is_file() and hashes.of(file).sha256 == note.read_text():
        return file
    tensors = open_torch_file(source.path)
    note.unlink(missing_ok=True)
    sha256 = write_safetensors(
        file,
        {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.tensors.items()},
        _pieces(tensors),
    )
    note.write_text(sha256)
    hashes.remember(file, sha256)
    return file


def _pieces(tensors: MappedTensors) -> Iterator[Iterator[memoryview]]:
    for name in tensors.tensors:
        raw = tensors.raw(name)
        yield (raw[at : at + PIECE_BYTES] for at in range(0, len(raw), PIECE_BYTES))
