"""Every weight once: names matched to the encoder's own, shapes and values checked, none left over.

Files differ in a prefix and carry tensors an encoder does not use; whoever builds the model sees
canonical names only. It knows names and shapes, not what is computed from them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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
        places = _places(shapes, family.fused)
        stored = _stored_shapes(shapes, places)
        try:
            refuse_strangers(held, stored, prefix, family.unused)
            for name, shape in stored.items():
                _check_shape(prefix + name, held[prefix + name].tensors[prefix + name].shape, shape)
        except ValueError as error:
            raise CheckpointRefused(f"{where}: {error}. Is its config.json its own?") from error
        self._where = where
        self._left = {
            name: (held[prefix + place.name], replace(place, name=prefix + place.name))
            for name, place in places.items()
        }

    def take(self, name: str) -> Float32Array:
        """The tensor *name*, float32, in the shape the encoder's config gives it.

        A view of the mapped file where that holds float32 (alive as long as it is used, and
        writable without reaching the file), a copy where it was widened. Raises `CheckpointRefused` for a value that is not
        finite or a stored type that is not a float.
        """
        assert name in self._left, f"{name} was taken before, or is none of this encoder's"
        file, place = self._left.pop(name)
        whole = file.float32(place.name)
        return whole if place.rows is None else whole[place.rows]

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


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor stands in a file."""

    name: str
    rows: slice | None = None  # of the stored tensor; None: all of them


def _places(
    shapes: Mapping[str, tuple[int, ...]], fused: Mapping[str, tuple[str, ...]]
) -> dict[str, Place]:
    """The place of every tensor of *shapes*, in a matrix of several layers where *fused* says so."""
    places = {name: Place(name) for name in shapes}
    for name in shapes:
        layer, _, part = name.rpartition(".")
        for whole, parts in fused.items():
            if not layer.endswith(f".{parts[0]}"):
                continue
            at, begin = layer.removesuffix(parts[0]), 0
            for one in parts:
                end = begin + shapes[f"{at}{one}.{part}"][0]
                places[f"{at}{one}.{part}"] = Place(f"{at}{whole}.{part}", slice(begin, end))
                begin = end
    return places


def _stored_shapes(
    shapes: Mapping[str, tuple[int, ...]], places: Mapping[str, Place]
) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor that a file must have, by the name it has there."""
    stored: dict[str, tuple[int, ...]] = {}
    for name, place in places.items():
        rows = shapes[name][0] if place.rows is None else place.rows.stop
        before = stored.get(place.name, (0,))[0]
        stored[place.name] = (max(rows, before), *shapes[name][1:])
    return stored


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
