"""Every weight once: names matched to the encoder's own, shapes and values checked, none left over.

Files differ in a prefix and carry tensors an encoder does not use; whoever builds the model sees
canonical names only. It knows names and shapes, not what is computed from them.
"""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from types import TracebackType

from trivec.checkpoints.tensors import MappedTensors
from trivec.core.errors import CheckpointRefused
from trivec.core.types import Float32Array
from trivec.models.registry import Family


class Weights:
    """Checked weights, each to be taken exactly once. A context manager; one thread at a time."""

    def __init__(
        self,
        files: Sequence[MappedTensors],
        shapes: Mapping[str, tuple[int, ...]],
        family: Family,
    ) -> None:
        """Match *files* to *shapes* (canonical name to shape) by their headers alone.

        Raises `CheckpointRefused` for a tensor that is missing, extra, doubled or mis-shaped.
        """
        held = _merge(files)
        prefix = find_prefix(held, family)
        where = files[0].file if len(files) == 1 else files[0].file.parent
        try:
            refuse_strangers(held, shapes, prefix, family.unused)
            self._left = {name: (held[prefix + name], prefix + name) for name in shapes}
            for name, (file, stored) in self._left.items():
                _check_shape(stored, file.tensors[stored].shape, shapes[name])
        except ValueError as error:
            raise CheckpointRefused(f"{where}: {error}. Is its config.json its own?") from error
        self._where = where

    def take(self, name: str) -> Float32Array:
        """The tensor *name*, float32, in the shape the encoder's config gives it.

        A view of the mapped file where that holds float32 (alive as long as it is used, and
        writable without reaching the file), a copy where it was widened. Raises `CheckpointRefused` for a value that is not
        finite or a stored type that is not a float.
        """
        assert name in self._left, f"{name} was taken before, or is none of this encoder's"
        file, stored = self._left.pop(name)
        return file.float32(stored)

    def finish(self) -> None:
        """Say that all was taken. Raises `CheckpointRefused`, naming what was not."""
        if self._left:
            raise CheckpointRefused(f"{self._where}: nothing used {_few(self._left)}")

    def __enter__(self) -> "Weights":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._left = {}  # views that are still in use keep their own map alive


def find_prefix(names: Mapping[str, object], family: Family) -> str:
    """What stands before the canonical names in a file, judged by the family's landmark."""
    found = [prefix for prefix in family.prefixes if prefix + family.landmark in names]
    return found[0] if len(found) == 1 else ""


def refuse_strangers(
    held: Mapping[str, object],
    shapes: Mapping[str, tuple[int, ...]],
    prefix: str,
    unused: Sequence[str],
) -> None:
    """Raise `ValueError` unless *held* has every name of *shapes*, and else what *unused* matches."""
    if missing := [name for name in shapes if prefix + name not in held]:
        raise ValueError(f"lacks {_few(missing)}")
    extra = [
        name
        for name in held
        if not (name.startswith(prefix) and name.removeprefix(prefix) in shapes)
        and not any(fnmatchcase(name.removeprefix(prefix), pattern) for pattern in unused)
    ]
    if extra:
        raise ValueError(f"holds {_few(extra)}, which this encoder does not have")


def _merge(files: Sequence[MappedTensors]) -> dict[str, MappedTensors]:
    held: dict[str, MappedTensors] = {}
    for file in files:
        for name in file.tensors:
            if name in held:
                raise CheckpointRefused(f"{file.file}: {name} is in {held[name].file.name} too")
            held[name] = file
    return held


def _check_shape(name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if found != expected:
        raise ValueError(f"{name} has shape {list(found)} where {list(expected)} is expected")


def _few(names: Mapping[str, object] | Sequence[str]) -> str:
    """The first names, and how many more there are."""
    first = list(names)[:3]
    more = len(names) - len(first)
    return ", ".join(first) + (f" and {more} more" if more else "")
