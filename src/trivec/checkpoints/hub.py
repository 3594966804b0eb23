"""Pulls from the Hugging Face hub: a catalogue model's files, resumed, checked, then kept.

After a pull nothing touches the network. The hub client's own downloads begin a file anew after
a stop, which with 2.3 GB loses much, so the parts it is made of are used here with part files of
ours. HF_ENDPOINT, HF_HUB_OFFLINE and HF_TOKEN are the client's.
"""

import fcntl
import hashlib
import io
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from trivec.checkpoints.catalogue import CatalogueEntry, Pin
from trivec.checkpoints.hashes import Hashes, sha256_of
from trivec.checkpoints.layout import HEADS, model_files, read_json
from trivec.core.errors import CheckpointRefused
from trivec.core.ports import OnProgress, no_progress

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_log = logging.getLogger("trivec.checkpoints")

PINS_FILE = "trivec-pins.json"
LOCK_FILE = ".pull.lock"
SHA256 = re.compile(r"[0-9a-f]{64}")


class FirstPull(msgspec.Struct, frozen=True):
    """What the first pull of an unpinned model found; later opens compare with it."""

    hub_id: str
    revision: str
    files: dict[str, Pin]


class PartFile(io.BufferedWriter):
    """A file that grows to *byte_count*, by appending, and tells how far it is."""

    def __init__(self, path: Path, name: str, byte_count: int, on_progress: OnProgress) -> None:
        super().__init__(io.FileIO(path, "ab"))
        self._byte_count = byte_count
        self._on_progress = on_progress
        self._what = f"pulling {name}"

    def write(self, chunk: "ReadableBuffer", /) -> int:
        count, done, size = super().write(chunk), self.tell(), self._byte_count
        step = f"{self._what}, {done / 1e6:,.1f} of {size / 1e6:,.1f} MB"
        self._on_progress(step, min(1.0, done / max(1, size)))
        return count


def pulled_folder(entry: CatalogueEntry, cache_dir: Path) -> Path:
    """Where the files of *entry* are kept once pulled."""
    return cache_dir / "hub" / entry.id.replace("/", "--")


def pulled_pins(entry: CatalogueEntry, cache_dir: Path) -> Mapping[str, Pin] | None:
    """What the pulled files of *entry* must be; None while the pull is not complete."""
    folder, pins = pulled_folder(entry, cache_dir), entry.pins
    if not pins and (folder / PINS_FILE).is_file():
        pins = read_json(folder / PINS_FILE, FirstPull).files
    return pins if pins and all((folder / name).is_file() for name in pins) else None


def pull(
    entry: CatalogueEntry,
    *,
    cache_dir: Path,
    endpoint: str | None = None,
    on_progress: OnProgress = no_progress,
) -> Path:
    """Fetch what is not there yet of *entry*, check all of it, and return its folder.

    *endpoint* is a hub other than HF_ENDPOINT's. Blocks for as long as it takes; stopping it loses
    nothing. Raises `CheckpointRefused` when the hub cannot be reached, has other files than the
    catalogue, or another pull of this model runs.
    """
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.errors import (  # type: ignore[attr-defined]
        HfHubHTTPError,
        HTTPError,
        OfflineModeIsEnabled,
    )
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

    constants.HF_HUB_DISABLE_TELEMETRY = True  # a pull tells the hub what it wants, no more
    disable_progress_bars("huggingface_hub.http_get")  # `PartFile` tells how far it is
    if entry.terms is not None:
        _log.warning("%s", entry.terms)
    folder = pulled_folder(entry, cache_dir)
    folder.mkdir(parents=True, exist_ok=True)
    copy = (
        "copy the model's folder from a machine that has it and serve it with "
        f"--model {entry.id}=DIR."
    )
    with (folder / LOCK_FILE).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # part files have one writer
        except BlockingIOError as error:
            raise CheckpointRefused(
                f"{folder}: another pull of this model is running; wait for it"
            ) from error
        try:
            revision, names = entry.revision or "main", [*entry.pins]
            if not entry.is_pinned:
                revision, names = _list_files(entry, endpoint)
            pins: dict[str, Pin] = {}
            hashes = Hashes(cache_dir / "hashes", on_progress=on_progress)
            for name in names:
                url = hf_hub_url(entry.hub_id, name, revision=revision, endpoint=endpoint)
                file, pin = folder / name, entry.pins.get(name)
                pins[name] = _fetch(url, file, pin, hashes, endpoint, on_progress)
            if not entry.is_pinned:  # the hub is believed this once
                content = msgspec.json.encode(FirstPull(entry.hub_id, revision, pins))
                (folder / PINS_FILE).write_bytes(msgspec.json.format(content))
        except OfflineModeIsEnabled as error:
            raise CheckpointRefused(
                f"{entry.id} is not on this machine and HF_HUB_OFFLINE is set. Unset it, or: {copy}"
            ) from error
        except (HTTPError, OSError) as error:
            reason = str(error).partition("\n")[0][:200] or type(error).__name__
            problem = (
                f"the files of {entry.hub_id} could not be fetched: {reason}. Try again (it "
                f"resumes), set HF_ENDPOINT to a mirror, or: {copy}"
            )
            if isinstance(error, HfHubHTTPError):
                problem = f"the hub does not give the files of {entry.hub_id}: {reason}; {copy}"
            raise CheckpointRefused(problem) from error
    return folder


def _list_files(entry: CatalogueEntry, endpoint: str | None) -> tuple[str, list[str]]:
    """The hub's revision of *entry*, and the files in it that the model is made of."""
    from huggingface_hub import HfApi

    listed = HfApi(endpoint=endpoint).model_info(entry.hub_id, revision=entry.revision)
    names = frozenset(sibling.rfilename for sibling in listed.siblings or [])
    if not entry.has_m3_heads:
        names = frozenset(name for name in names if Path(name).stem not in HEADS)
    try:
        if listed.sha is None:
            raise ValueError("has no revision")
        return listed.sha, model_files(names)
    except ValueError as error:
        raise CheckpointRefused(f"{entry.hub_id} on the hub {error}") from error


def _fetch(
    url: str,
    file: Path,
    pin: Pin | None,
    hashes: Hashes,
    endpoint: str | None,
    on_progress: OnProgress,
) -> Pin:
    """Have *file* as it is at *url*, and as *pin* demands; what it is then.

    Without a pin the hub's own sha256 is demanded, which it gives for large files.
    """
    from huggingface_hub import get_hf_file_metadata
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    headers = build_hf_headers(library_name="trivec")
    found = get_hf_file_metadata(url, headers=headers, endpoint=endpoint)
    if found.etag is None or found.size is None:
        raise CheckpointRefused(f"{url}: the hub tells neither size nor version of this file")
    if found.location != url:  # a storage host, which the hub's token is not meant for
        headers.pop("authorization", None)
    if pin is None and SHA256.fullmatch(found.etag):
        pin = Pin(found.size, found.etag)
    if pin is not None and found.size != pin.byte_count:
        raise CheckpointRefused(
            f"{found.location}: has {found.size:,} bytes, expected are {pin.byte_count:,}; the "
            "hub's file is not the one that is known"
        )
    if file.is_file() and file.stat().st_size == found.size:
        hashed = hashes.of(file)
        if pin is None or hashed.sha256 == pin.sha256:
            return Pin(hashed.byte_count, hashed.sha256)
        file.unlink()
    # Another version of the file has another part file.
    version = hashlib.sha256(found.etag.encode()).hexdigest()
    part = file.parent / f".{file.name}.{version[:16]}.part"
    part.parent.mkdir(parents=True, exist_ok=True)
    with PartFile(part, file.name, found.size, on_progress) as out:
        if out.tell() > found.size:
            out.truncate(0)
        http_get(
            found.location,
            out,
            resume_size=out.tell(),
            headers=headers,
            expected_size=found.size,
            displayed_filename=file.name,
        )
    sha256 = sha256_of(part, lambda _step, share: on_progress(f"hashing {file.name}", share))
    if pin is not None and sha256 != pin.sha256:
        part.unlink()
        raise CheckpointRefused(
            f"{found.location}: has sha256 {sha256}, expected is {pin.sha256}; what arrived was "
            "thrown away. Pull again; if it stays so, the hub's file was changed."
        )
    part.replace(file)
    hashes.remember(file, sha256)
    return Pin(found.size, sha256)
