"""Plain keys, their digests, and the server's secret that they are hashed under.

A plain key has 52 characters: `tv_`, 43 of base62 (32 random bytes), and 6 of base62 (the CRC-32 of
those before). The checksum is for people and secret scanners. The server ignores it, so that a
mistyped key costs the same as any other unknown key.
"""

import hashlib
import hmac
import os
import secrets
import zlib
from contextlib import suppress
from pathlib import Path

from trivec.core.errors import SettingInvalid

PREFIX = "tv_"
ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
RANDOM_BYTES = 32
RANDOM_CHARS = 43  # 62**43 > 256**32
CHECKSUM_CHARS = 6  # 62**6 > 2**32
KEY_CHARS = len(PREFIX) + RANDOM_CHARS + CHECKSUM_CHARS
BEARER_CHARS_MAX = 1024  # a longer one is no key, and not worth hashing
FIRST_CHARS = 8
LAST_CHARS = 4
SECRET_FILE = "secret"  # noqa: S105, the name of a file
SECRET_BYTES = 32
SECRET_GIVEN_CHARS_MIN = 32


def new_plain_key() -> str:
    number = int.from_bytes(secrets.token_bytes(RANDOM_BYTES), "big")
    body = PREFIX + base62(number, RANDOM_CHARS)
    return body + _checksum(body)


def new_key_id() -> str:
    """A short public id for a key; 71 random bits, so that it is unique."""
    return "key_" + "".join(secrets.choice(ALPHABET) for _ in range(12))


def is_well_formed(plain: str) -> bool:
    """Whether *plain* looks like one of our keys without a typo; it may still be unknown."""
    if len(plain) != KEY_CHARS or not plain.startswith(PREFIX):
        return False
    return plain[-CHECKSUM_CHARS:] == _checksum(plain[:-CHECKSUM_CHARS])


def digest(plain: str, *, secret: bytes) -> bytes:
    """HMAC-SHA256 of *plain* under the server's secret: 32 bytes, all that is ever stored."""
    return hmac.digest(secret, b"key:" + plain.encode("utf-8", "surrogatepass"), hashlib.sha256)


def pseudonym(text: str, *, secret: bytes, purpose: str) -> bytes:
    """16 bytes that replace *text* in the store, and cannot be reversed without the secret."""
    message = purpose.encode() + b":" + text.encode("utf-8", "surrogatepass")
    return hmac.digest(secret, message, hashlib.sha256)[:16]


def base62(number: int, length: int) -> str:
    """*number* in base 62, most significant digit first, padded to *length* characters."""
    digits = []
    for _ in range(length):
        number, digit = divmod(number, 62)
        digits.append(ALPHABET[digit])
    assert number == 0, "the number needs more characters"
    return "".join(reversed(digits))


def _checksum(body: str) -> str:
    return base62(zlib.crc32(body.encode("utf-8", "surrogatepass")), CHECKSUM_CHARS)


def server_secret(data_dir: Path, *, given: str | None) -> bytes:
    """*given* by the environment, else the one of *data_dir*, which is made at its first use.

    Raises `SettingInvalid`.
    """
    if given is not None:
        if len(given) < SECRET_GIVEN_CHARS_MIN:
            raise SettingInvalid(
                f"secret has {len(given)} characters; give it at least {SECRET_GIVEN_CHARS_MIN}, "
                "from: openssl rand -hex 32"
            )
        return given.encode()
    file = data_dir / SECRET_FILE
    try:
        if not file.exists():
            content = secrets.token_hex(SECRET_BYTES).encode()
            write_whole(file, content, replaces=False)
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


def write_whole(file: Path, content: bytes, *, replaces: bool) -> None:
    """Make *file* (mode 0600), whole or not at all, and on disk when this returns.

    An existing one is replaced, or else kept: of several processes the first one wins.
    """
    draft = file.with_name(f"{file.name}.{secrets.token_hex(8)}")
    try:
        with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as out:
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
        if replaces:
            draft.replace(file)
        else:
            with suppress(FileExistsError):
                os.link(draft, file)
        sync_folder(file.parent)
    finally:
        draft.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make the names of new and renamed files in *folder* survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
