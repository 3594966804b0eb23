"""Checkpoint: a model's files found, hashed, compared with what is known, and only then read."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from trivec.checkpoints.catalogue import CATALOGUE, CatalogueEntry, Pin, Wheel, entries
from trivec.checkpoints.hashes import HashedFile, Hashes
from trivec.checkpoints.hub import pull, pulled_folder, pulled_pins
from trivec.checkpoints.layout import (
    HEADS,
    TOKENIZER_FILE,
    WEIGHT_FILES,
    SentenceSettings,
    model_files,
    read_config,
    read_heads,
    read_sentence_settings,
    read_tokenizer_length,
    scan,
)
from trivec.checkpoints.tensor_files import as_safetensors, open_tensor_file
from trivec.checkpoints.weights import Weights
from trivec.core.errors import CheckpointRefused
from trivec.core.types import NO_PROMPTS, Output
from trivec.models.ops import ModelConfig
from trivec.models.pooling import Heads, Pooling
from trivec.models.registry import FAMILIES, tensor_shapes

MODEL_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)*", re.ASCII)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model's files, hashed, checked and understood; only the encoder's weights are unread."""

    id: str
    aliases: tuple[str, ...]
    folder: Path
    config: ModelConfig
    pooling: Pooling
    normalize: bool
    token_count_max: int  # special tokens included
    tokenizer_file: Path
    heads: Heads | None
    digest: str  # sha256 over names and hashes of all files in use: a key for what is made of them
    verified: bool  # every file in use has the hash that the catalogue gives it
    source: str  # "wheel", "hub" or "folder"
    created: int  # Unix seconds
    owned_by: str
    dimensions_selectable: bool
    weight_file: HashedFile
    cache_dir: Path
    prompts: Mapping[str, str] = field(default_factory=lambda: NO_PROMPTS)  # put before a text
    default_prompt_name: str | None = None
    include_prompt: bool = True  # False: a prompt's tokens are left out of the pooled mean
    matryoshka_dimensions: tuple[int, ...] = ()  # sizes a vector may be cut to
    labels: int = 0  # numbers in a score

    @property
    def dimensions(self) -> int:
        """Numbers in a dense vector."""
        return self.config.hidden_size

    @property
    def outputs(self) -> Output:
        """What one forward pass can yield."""
        if self.heads is None:
            return Output.DENSE
        return Output.DENSE | Output.SPARSE | Output.MULTI

    def weights(self) -> Weights:
        """Open the encoder's weights: names and shapes are checked now, values as they are taken.

        A torch file is converted first, once: seconds and as much disk under `cache_dir` again.
        Raises `CheckpointRefused`.
        """
        opened = open_tensor_file(as_safetensors(self.weight_file, cache_dir=self.cache_dir))
        return Weights(opened, tensor_shapes(self.config), FAMILIES[self.config.family])


@dataclass(frozen=True, slots=True)
class Location:
    """Where a reference leads."""

    id: str
    entry: CatalogueEntry | None
    folder: Path
    source: str  # "wheel", "hub" or "folder"
    pins: Mapping[str, Pin]  # what is known of the files; they must be so unless it is a "folder"


def open_checkpoint(reference: str, *, cache_dir: Path) -> Checkpoint:
    """Open the model that *reference* names: `ID`, `DIR` or `ID=DIR`.

    A catalogue id's own files must have the catalogue's hashes; a folder given by the user need
    not, and is `verified` where it has. An id whose files are not on this machine is pulled from
    the hub, unless they come in a wheel. Blocks for as long as hashing takes when the files are
    new (about 1.5 GB/s); hashes are cached under *cache_dir*. Raises `CheckpointRefused` for
    anything missing, damaged, unsafe or not understood.
    """
    entry = CATALOGUE.get(reference)
    if entry is None:
        return _open(find_folder(reference), cache_dir)
    found = open_own(entry, cache_dir=cache_dir)
    if found is None and entry.wheel is not None:
        wheel = f"{entry.wheel.distribution}=={entry.wheel.version}"
        raise CheckpointRefused(
            f"the files of {entry.id} are not on this machine. Run `trivec models pull "
            f"{entry.id}`, or install them beside Trivec: `pip install --no-deps {wheel}`, with "
            f"pipx `pipx inject trivec {wheel}`, with uv `uv tool install --with {wheel} trivec`."
        )
    if found is None:
        pull(entry, cache_dir=cache_dir)
        found = open_own(entry, cache_dir=cache_dir)
        assert found is not None, "a pull that raises nothing is complete"
    return found


def open_own(entry: CatalogueEntry, *, cache_dir: Path) -> Checkpoint | None:
    """The catalogue's own copy of *entry*: its installed wheel, or a finished pull, or None.

    Never touches the network. Raises `CheckpointRefused` where the copy is damaged.
    """
    if entry.wheel is not None and (folder := wheel_folder(entry.wheel)) is not None:
        return _open(Location(entry.id, entry, folder, "wheel", entry.pins), cache_dir)
    if (pins := pulled_pins(entry, cache_dir)) is not None:
        folder = pulled_folder(entry, cache_dir).resolve()
        return _open(Location(entry.id, entry, folder, "hub", pins), cache_dir)
    return None


def wheel_folder(wheel: Wheel) -> Path | None:
    """Where *wheel* is installed, read from its metadata; the package is not imported."""
    try:
        installed = metadata.distribution(wheel.distribution)
    except metadata.PackageNotFoundError:
        return None
    folder = Path(str(installed.locate_file(wheel.folder))).resolve()
    return folder if (folder / "config.json").is_file() else None


def find_folder(reference: str) -> Location:
    """The user's own folder that `DIR` or `ID=DIR` names. Raises `CheckpointRefused`."""
    name, is_named, path = reference.partition("=")
    path = path if is_named else reference
    try:
        folder = Path(path).expanduser().resolve(strict=True)
    except (OSError, RuntimeError, ValueError) as error:
        known = ", ".join(entry.id for entry in entries())
        raise CheckpointRefused(
            f"{path!r} is neither a folder nor a known model. Known: {known}"
        ) from error
    name = name if is_named else folder.name
    if not MODEL_ID.fullmatch(name):
        raise CheckpointRefused(
            f"{name!r} cannot be a model's id; give one of letters, digits and ._-/ as ID={path}"
        )
    entry = CATALOGUE.get(name) if is_named else None
    if entry is None:
        return Location(name, None, folder, "folder", {})
    return Location(entry.id, entry, folder, "folder", entry.pins)


def _open(found: Location, cache_dir: Path) -> Checkpoint:
    """Hash the files and compare them; then read the small ones."""
    folder, entry = found.folder, found.entry
    names = scan(folder)
    try:
        used = model_files(names, known=found.pins)
    except ValueError as error:
        raise CheckpointRefused(f"{folder}: {error}") from error
    hashes = Hashes(cache_dir / "hashes")
    hashed = {name: hashes.of(folder / name) for name in used}
    if found.source != "folder":
        _refuse_other_files(found, hashed)
    sha256s = {name: file.sha256 for name, file in hashed.items()}

    config = read_config(folder)
    settings: SentenceSettings | CatalogueEntry | None = entry
    if "modules.json" in names:
        settings = read_sentence_settings(folder, names, hidden_size=config.hidden_size)
    if settings is None:
        raise CheckpointRefused(
            f"{folder}: holds no modules.json, so its pooling is not known. Save it with "
            "sentence-transformers, or give it the id of the model it is a copy of (ID=DIR)."
        )
    lengths = (settings.token_count_max, read_tokenizer_length(folder, names))
    heads = [name for name in used if Path(name).stem in HEADS]
    (weight_file,) = (file for name, file in hashed.items() if name in WEIGHT_FILES)
    lines = sorted(f"{sha256} {name}\n" for name, sha256 in sha256s.items())
    return Checkpoint(
        id=found.id,
        aliases=entry.aliases if entry else (),
        folder=folder,
        config=config,
        pooling=settings.pooling,
        normalize=settings.normalize,
        token_count_max=min([config.token_count_max, *(one for one in lengths if one)]),
        tokenizer_file=folder / TOKENIZER_FILE,
        heads=read_heads(folder, heads, hidden_size=config.hidden_size) if heads else None,
        digest=hashlib.sha256("".join(lines).encode()).hexdigest(),
        verified=entry is not None
        and sha256s == {name: pin.sha256 for name, pin in entry.pins.items()},
        source=found.source,
        created=entry.created if entry else int(weight_file.path.stat().st_mtime),
        owned_by=entry.owned_by if entry else "local",
        dimensions_selectable=entry is not None and entry.dimensions_selectable,
        weight_file=weight_file,
        cache_dir=cache_dir,
    )


def _refuse_other_files(found: Location, hashed: Mapping[str, HashedFile]) -> None:
    """Raise `CheckpointRefused` unless *hashed* are the files that are known, and all of them."""
    for name in dict.fromkeys((*hashed, *found.pins)):
        file, pin = hashed.get(name), found.pins.get(name)
        if file is None:
            problem = "is missing"
        elif pin is None:
            problem = "is not among the model's known files"
        elif file.byte_count != pin.byte_count:
            problem = f"has {file.byte_count:,} bytes, expected are {pin.byte_count:,}"
        elif file.sha256 != pin.sha256:
            problem = f"has sha256 {file.sha256}, expected is {pin.sha256}"
        else:
            continue
        raise CheckpointRefused(
            f"{found.folder / name}: {problem}. Fetch it again, or serve the copy as it is with "
            f"{found.id}={found.folder} (shown as verified: false)."
        )
