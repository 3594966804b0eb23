"""Pulling a catalogue model from the hub, once: resumed where it stopped, checked, then kept.

After a pull nothing touches the network. The hub client's own downloads begin a file anew after
a stop; with 2.3 GB that is a long way back, so the pieces it is made of are used here with part
files of ours (docs/decisions/0022). HF_ENDPOINT, HF_HUB_OFFLINE and HF_TOKEN are the client's.
"""

import fcntl
import hashlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

from trivec.checkpoints.catalogue import CatalogueEntry
from trivec.checkpoints.folder import read_json
from trivec.checkpoints.hashes import Hashes
from trivec.checkpoints.heads import head_files
from trivec.checkpoints.layout import LAYOUT_FILES
from trivec.checkpoints.pins import Pin
from trivec.core.errors import CheckpointRefused

PINS_FILE = "trivec-pins.json"
LOCK_FILE = ".pull.lock"
SHA256 = re.compile(r"[0-9a-f]{64}")
OPTIONAL_FILES = frozenset(LAYOUT_FILES) - {"config.json"}


class FirstPull(msgspec.Struct, frozen=True):
    """What the first pull of an unpinned model found; later opens compare with it."""

    hub_id: str
    revision: str
    files: dict[str, tuple[int, str]]  # name to bytes and sha256

    @property
    def pins(self) -> dict[str, Pin]:
        return {name: Pin(*pin) for name, pin in self.files.items()}


@dataclass(frozen=True, slots=True)
class _Remote:
    """A file as the hub describes it."""

    url: str
    etag: str
    byte_count: int
    headers: dict[str, str]


def pulled_folder(entry: CatalogueEntry, cache_dir: Path) -> Path:
    """Where the files of *entry* are kept once pulled."""
    return cache_dir / "hub" / entry.id.replace("/", "--")


def pulled_pins(entry: CatalogueEntry, cache_dir: Path) -> Mapping[str, Pin] | None:
    """What the pulled files of *entry* must be; None while the pull is not complete."""
    folder = pulled_folder(entry, cache_dir)
    if entry.is_pinned:
        pins = entry.pins
    elif (folder / PINS_FILE).is_file():
        pins = read_json(folder / PINS_FILE, FirstPull).pins
    else:
        return None
    return pins if all((folder / name).is_file() for name in pins) else None


def pull(entry: CatalogueEntry, *, cache_dir: Path, endpoint: str | None = None) -> Path:
    """Fetch what is not there yet of *entry*, check all of it, and return its folder.

    *endpoint* is a hub other than HF_ENDPOINT's. Shows a progress bar on standard error. Blocks
    for as long as it takes; stopping it loses nothing. Raises `CheckpointRefused` when the hub
    cannot be reached, has other files than the catalogue, or another pull of this model runs.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    constants.HF_HUB_DISABLE_TELEMETRY = True  # a pull tells the hub what it wants, no more
    folder = pulled_folder(entry, cache_dir)
    with _alone(folder):
        try:
            return _pull(entry, folder, Hashes(cache_dir / "hashes"), endpoint)
        except (HTTPError, OSError) as error:
            raise CheckpointRefused(_unreachable(entry, error)) from error


def _pull(entry: CatalogueEntry, folder: Path, hashes: Hashes, endpoint: str | None) -> Path:
    if entry.is_pinned:
        revision, pins = entry.revision or "main", entry.pins
        for name, pin in pins.items():
            _fetch(entry, folder / name, _ask(entry, name, revision, endpoint), pin, hashes)
        return folder
    return _pull_unpinned(entry, folder, hashes, endpoint)


def _pull_unpinned(
    entry: CatalogueEntry, folder: Path, hashes: Hashes, endpoint: str | None
) -> Path:
    """Believe the hub this once, and write down what came."""
    revision, names = _list_files(entry, endpoint)
    found: dict[str, tuple[int, str]] = {}
    for name in names:
        remote = _ask(entry, name, revision, endpoint)
        pin = Pin(remote.byte_count, remote.etag) if SHA256.fullmatch(remote.etag) else None
        _fetch(entry, folder / name, remote, pin, hashes)
        hashed = hashes.of(folder / name)
        found[name] = (hashed.byte_count, hashed.sha256)
    content = msgspec.json.encode(FirstPull(entry.hub_id, revision, found))
    (folder / PINS_FILE).write_bytes(msgspec.json.format(content))
    return folder


def _list_files(entry: CatalogueEntry, endpoint: str | None) -> tuple[str, list[str]]:
    """The commit that the hub's main branch is at, and which of its files the model is made of."""
    from huggingface_hub import HfApi

    listed = HfApi(endpoint=endpoint).model_info(entry.hub_id, revision=entry.revision)
    names = {sibling.rfilename for sibling in listed.siblings or []}
    weights = [name for name in ("model.safetensors", "pytorch_model.bin") if name in names]
    needed = ["config.json", "tokenizer.json", *weights[:1]]
    if not weights or not names.issuperset(needed) or listed.sha is None:
        raise CheckpointRefused(
            f"{entry.hub_id} on the hub lacks config.json, tokenizer.json or weights; it cannot "
            "be served"
        )
    return listed.sha, [*sorted(OPTIONAL_FILES & names), *needed, *_heads(entry, names)]


def _heads(entry: CatalogueEntry, names: set[str]) -> list[str]:
    if not entry.has_heads:
        return []
    try:
        return head_files(frozenset(names))
    except ValueError as error:
        raise CheckpointRefused(f"{entry.hub_id} on the hub {error}") from error


def _ask(entry: CatalogueEntry, name: str, revision: str, endpoint: str | None) -> _Remote:
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    url = hf_hub_url(entry.hub_id, name, revision=revision, endpoint=endpoint)
    headers = build_hf_headers(library_name="trivec")
    found = get_hf_file_metadata(url, headers=headers, endpoint=endpoint)
    if found.etag is None or found.size is None:
        raise CheckpointRefused(f"{url}: the hub tells neither size nor version of this file")
    if found.location != url:  # a storage host, which the hub's token is not meant for
        headers.pop("authorization", None)
    return _Remote(found.location, found.etag, found.size, headers)


def _fetch(
    entry: CatalogueEntry, file: Path, remote: _Remote, pin: Pin | None, hashes: Hashes
) -> None:
    """Have *file* on disk as *remote* describes it and *pin* demands it."""
    if pin is not None and remote.byte_count != pin.byte_count:
        raise CheckpointRefused(
            f"{remote.url}: has {remote.byte_count:,} bytes, expected are {pin.byte_count:,}; the "
            f"hub's file is not the one known as {entry.id}"
        )
    if file.is_file() and file.stat().st_size == remote.byte_count:
        if pin is None or hashes.of(file).sha256 == pin.sha256:
            return
        file.unlink()
    part = _part(file, entry, remote)
    _download(part, remote, shown_as=file.name)
    with part.open("rb") as opened:
        sha256 = hashlib.file_digest(opened, "sha256").hexdigest()
    if pin is not None and sha256 != pin.sha256:
        part.unlink()
        raise CheckpointRefused(
            f"{remote.url}: has sha256 {sha256}, expected is {pin.sha256}; what arrived was "
            "thrown away. Pull again; if it stays so, the hub's file was changed."
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    part.replace(file)
    hashes.remember(file, sha256)


def _part(file: Path, entry: CatalogueEntry, remote: _Remote) -> Path:
    """Where the first bytes of a download wait; another version of the file has another."""
    version = hashlib.sha256(f"{entry.hub_id} {file.name} {remote.etag}".encode()).hexdigest()
    return file.parent / f".{file.name}.{version[:16]}.part"


def _download(part: Path, remote: _Remote, *, shown_as: str) -> None:
    from huggingface_hub.file_download import http_get

    part.parent.mkdir(parents=True, exist_ok=True)
    with part.open("ab") as out:
        if out.tell() > remote.byte_count:
            out.truncate(0)
        http_get(
            remote.url,
            out,
            resume_size=out.tell(),
            headers=remote.headers,
            expected_size=remote.byte_count,
            displayed_filename=shown_as,
        )


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep a second pull from writing into the same part files."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK_FILE).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CheckpointRefused(
                f"{folder}: another pull of this model is running; wait for it"
            ) from error
        yield


def _unreachable(entry: CatalogueEntry, error: Exception) -> str:
    """One line that says what to do instead."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    instead = (
        "Copy the model's folder from a machine that has it and serve it with "
        f"--model {entry.id}=DIR."
    )
    if isinstance(error, OfflineModeIsEnabled):
        return (
            f"{entry.id} is not on this machine and HF_HUB_OFFLINE is set. Unset it, or: {instead}"
        )
    reason = str(error).partition("\n")[0][:200] or type(error).__name__
    if isinstance(error, HfHubHTTPError):
        return f"the hub does not give the files of {entry.hub_id}: {reason} {instead}"
    return (
        f"the files of {entry.hub_id} could not be fetched: {reason}. Try again (it resumes), set "
        f"HF_ENDPOINT to a mirror, or: {instead}"
    )
