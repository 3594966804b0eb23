"""Weights of a model: names matched to the family's own, shapes and values checked, each used once.

Files differ in a prefix and carry tensors that the model does not read; the rest of the program
sees the family's names only.
"""

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from fnmatch import fnmatchcase
from pathlib import Path

from trivec.checkpoints.hashes import HashedFile
from trivec.checkpoints.tensor_files import TensorFiles, as_safetensors, open_tensor_file
from trivec.core.errors import CheckpointRefused
from trivec.core.types import Float32Array
from trivec.models.registry import Family


def open_weights(files: Sequence[HashedFile], *, cache_dir: Path) -> TensorFiles:
    """Map the weight *files* of a model; a torch file is converted first, once, see `as_safetensors`."""
    return TensorFiles(
        [open_tensor_file(as_safetensors(file, cache_dir=cache_dir)) for file in files]
    )


class Weights(AbstractContextManager["Weights"]):
    """Checked weights, each to be taken exactly once. One thread at a time."""

    def __init__(
        self,
        file: TensorFiles,
        shapes: Mapping[str, tuple[int, ...]],
        family: Family,
        head: Collection[str] = (),
    ) -> None:
        """Match *file* to *shapes* (the family's name to shape) by its header alone.

        *head*: tensors that the model's head has read. Raises `CheckpointRefused` for a tensor that
        is missing, extra or mis-shaped.
        """

        def refusal(problem: str) -> CheckpointRefused:
            return CheckpointRefused(f"{file.file}: {problem}. Is its config.json its own?")

        self._file = file
        self._names = {family.own_name(name): name for name in file.tensors}  # ours to the file's
        stored = {name: file.tensors[theirs] for name, theirs in self._names.items()}
        prefixes = [one for one in family.prefixes if one + family.key_tensor in stored]
        prefix = prefixes[0] if len(prefixes) == 1 else ""
        fused = {
            whole: parts
            for whole, parts in family.fused.items()
            if any(f".{whole}." in name for name in stored)
        }
        places, stored_shapes = _places(shapes, fused)
        self._transposed = family.transposed
        for name, shape in stored_shapes.items():
            if name.endswith(self._transposed):
                stored_shapes[name] = shape[::-1]
        self._left = {name: (prefix + whole, rows) for name, (whole, rows) in places.items()}
        expected = {prefix + name: shape for name, shape in stored_shapes.items()}
        if missing := [name for name in stored_shapes if prefix + name not in stored]:
            raise refusal(f"lacks {_first_of(missing)}")
        unused = (*family.unused, *(prefix + pattern for pattern in family.unused))
        extra = [name for name in stored if name not in expected and self._names[name] not in head]
        extra = [name for name in extra if not any(fnmatchcase(name, one) for one in unused)]
        if extra:
            raise refusal(f"holds {_first_of(extra)}, which this encoder does not have")
        for name, shape in expected.items():
            if (found := stored[name].shape) != shape:
                raise refusal(f"{name} has shape {list(found)} where {list(shape)} is expected")

    def take(self, name: str) -> Float32Array:
        """The tensor *name*, float32, in the shape the model's config gives it.

        A view of the mapped file where that holds float32 (alive as long as it is used, and
        writable without reaching the file), a copy where it was widened. Raises
        `CheckpointRefused` for a value that is not finite or a stored type that is not a float.
        """
        assert name in self._left, f"{name} was taken before, or is none of this encoder's"
        whole, rows = self._left.pop(name)
        found = self._file.float32(self._names[whole])
        return found.T.copy() if name.endswith(self._transposed) else found[rows]

    def release_pages(self) -> None:
        """Drop what of the files is in memory; views are read again when they are needed."""
        self._file.release_pages()

    def finish(self) -> None:
        """Say that all was taken. Raises `CheckpointRefused`, naming what was not."""
        if self._left:
            raise CheckpointRefused(f"{self._file.file}: nothing used {_first_of([*self._left])}")

    def __exit__(self, *_: object) -> None:
        del self._left, self._file  # views that are still in use keep their own map alive


def _places(
    shapes: Mapping[str, tuple[int, ...]], fused: Mapping[str, tuple[str, ...]]
) -> tuple[dict[str, tuple[str, slice]], dict[str, tuple[int, ...]]]:
    """Where each tensor of *shapes* stands in a file (name, rows), and the shapes stored there.

    Where *fused* says so, the rows of several layers stand in one matrix, in its order.
    """
    places, stored = {name: (name, slice(None)) for name in shapes}, dict(shapes)
    for name in shapes:
        layer, _, kind = name.rpartition(".")
        for whole, parts in fused.items():
            if not layer.endswith(f".{parts[0]}"):
                continue
            block, begin = layer.removesuffix(parts[0]), 0
            for part in parts:
                rows, *rest = stored.pop(f"{block}{part}.{kind}")
                span = slice(begin, begin + rows)
                places[f"{block}{part}.{kind}"] = (f"{block}{whole}.{kind}", span)
                begin += rows
            stored[f"{block}{whole}.{kind}"] = (begin, *rest)
    return places, stored


def _first_of(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
