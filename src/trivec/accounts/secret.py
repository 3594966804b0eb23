"""The server's own secret: without it, what the store holds of a key cannot be made from the key."""

import os
import secrets
from pathlib import Path

from trivec.accounts import keys
from trivec.accounts.store import Store
from trivec.core.errors import SettingInvalid, StoreRefused

FILE_NAME = "secret"
SECRET_BYTES = 32
GIVEN_CHARS_MIN = 32


def server_secret(data_dir: Path, *, given: str | None) -> bytes:
    """*given* by the environment, else that of *data_dir*, which is made at its first use.

    Raises `SettingInvalid`.
    """
    if given is not None:
        if len(given) < GIVEN_CHARS_MIN:
            raise SettingInvalid(
                f"secret has {len(given)} characters; give it at least {GIVEN_CHARS_MIN}, "
                "from: openssl rand -hex 32"
            )
        return given.encode()
    file = data_dir / FILE_NAME
    try:
        if not file.exists():
            _make(file)
        secret = bytes.fromhex(file.read_text("ascii"))
    except OSError as fault:
        raise SettingInvalid(
            f"the server's secret {file} cannot be read or made: {fault.strerror}; "
            "make the folder yours, or set TRIVEC_SECRET"
        ) from fault
    except ValueError as fault:
        raise SettingInvalid(f"{file} does not hold a secret; restore it from a copy") from fault
    if len(secret) != SECRET_BYTES:
        raise SettingInvalid(f"{file} is damaged; restore it from a copy")
    return secret


def check_secret(store: Store, secret: bytes) -> None:
    """Raise `StoreRefused` when the store's keys were made under another secret."""
    proposed = keys.pseudonym("", secret=secret, purpose="check")
    if store.agree_secret_check(proposed) != proposed:
        raise StoreRefused(
            "the keys in this store were made with another secret, so none of them would be known; "
            "restore the file `secret` of its data folder, or set TRIVEC_SECRET to what it was"
        )


def _make(file: Path) -> None:
    """Whole or not at all, and the first process wins: a link never replaces a file."""
    draft = file.with_name(f"{file.name}.{secrets.token_hex(8)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w") as opened:
            opened.write(secrets.token_hex(SECRET_BYTES))
            opened.flush()
            os.fsync(opened.fileno())
        try:
            os.link(draft, file)
        except FileExistsError:
            return
        folder = os.open(file.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    finally:
        draft.unlink()
