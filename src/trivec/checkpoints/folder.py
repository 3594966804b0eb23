"""The files of a model's folder, surveyed before any of them is opened.

It refuses what could reach outside the folder or ask for code to be run: links, `.py` files,
anything that is not an ordinary file. It does not know what the files mean.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import msgspec

from trivec.core.errors import CheckpointRefused

ENTRIES_MAX = 10_000
JSON_BYTES_MAX = 1024 * 1024

T = TypeVar("T")


def survey(folder: Path) -> frozenset[str]:
    """Names of all files under *folder*, with `/` between parts.

    Raises `CheckpointRefused` for a link that leads out of the folder (of the model's own part of
    a hub cache, where *folder* is a snapshot in one), for Python code, for more than ENTRIES_MAX
    entries, and for anything that is neither a file nor a folder.
    """
    inside = link_root(folder)
    names: set[str] = set()
    for entry in _walk(folder):
        name = entry.relative_to(folder).as_posix()
        if len(names) >= ENTRIES_MAX:
            raise CheckpointRefused(
                f"{folder}: more than {ENTRIES_MAX:,} files; this is no model's folder"
            )
        if entry.is_symlink() and not entry.resolve().is_relative_to(inside):
            raise CheckpointRefused(
                f"{entry}: is a link that leads out of {inside}. Put the file itself there."
            )
        if entry.is_dir():
            continue
        if not entry.is_file():
            raise CheckpointRefused(f"{entry}: is not an ordinary file. Remove it.")
        if entry.suffix in (".py", ".pyc", ".so"):
            raise CheckpointRefused(
                f"{entry}: is code, and no model's code is ever run. If the model works without "
                "it, remove it."
            )
        names.add(name)
    return frozenset(names)


def link_root(folder: Path) -> Path:
    """How far links in *folder* may lead: `models--NAME` of a hub cache, or the folder itself."""
    snapshots = folder.parent
    if snapshots.name == "snapshots" and snapshots.parent.name.startswith("models--"):
        return snapshots.parent
    return folder


def _walk(folder: Path) -> Iterator[Path]:
    """Every entry under *folder*; links to folders are named but not entered."""
    for parent, folders, files in os.walk(folder, onerror=_refuse_unreadable):
        for name in sorted(folders + files):
            yield Path(parent, name)


def _refuse_unreadable(error: OSError) -> None:
    raise CheckpointRefused(f"{error.filename}: cannot be read: {error}") from error


def read_json(file: Path, kind: type[T]) -> T:
    """The JSON in *file* as a *kind*. Raises `CheckpointRefused`, naming the field at fault."""
    try:
        with file.open("rb") as opened:
            content = opened.read(JSON_BYTES_MAX + 1)
        if len(content) > JSON_BYTES_MAX:
            raise CheckpointRefused(f"{file}: larger than {JSON_BYTES_MAX:,} bytes")
        return msgspec.json.decode(content, type=kind)
    except (OSError, RecursionError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise CheckpointRefused(f"{file}: not understood: {error}") from error
