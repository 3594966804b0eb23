"""How a plain key looks and how it is turned into what we store. Pure; knows no store.

`tv_`, 43 characters of base62 (32 random bytes), and 6 of base62 (CRC-32 of all before): 52 in all.
The checksum is for people and secret scanners; the server never looks at it, so that a well-formed
stranger and a typo cost the same.
"""

import hashlib
import hmac
import secrets
import zlib

PREFIX = "tv_"
ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
RANDOM_BYTES = 32
RANDOM_CHARS = 43  # 62**43 > 256**32
CHECKSUM_CHARS = 6  # 62**6 > 2**32
KEY_CHARS = len(PREFIX) + RANDOM_CHARS + CHECKSUM_CHARS
BEARER_CHARS_MAX = 1024  # longer ones are no key of anybody's and are not worth hashing
FIRST_CHARS = 8
LAST_CHARS = 4


def new_plain_key() -> str:
    """A key that nobody has ever seen."""
    number = int.from_bytes(secrets.token_bytes(RANDOM_BYTES), "big")
    body = PREFIX + base62(number, RANDOM_CHARS)
    return body + _checksum(body)


def new_key_id() -> str:
    """A short public name for a key; 71 random bits, so that no store ever meets it twice."""
    return "key_" + "".join(secrets.choice(ALPHABET) for _ in range(12))


def is_well_formed(plain: str) -> bool:
    """Whether *plain* is one of our keys without a typo; says nothing of whether it is valid."""
    if len(plain) != KEY_CHARS or not plain.startswith(PREFIX):
        return False
    return plain[-CHECKSUM_CHARS:] == _checksum(plain[:-CHECKSUM_CHARS])


def digest(plain: str, *, secret: bytes) -> bytes:
    """HMAC-SHA256 of *plain* under the server's secret: 32 bytes, all that is ever stored."""
    return hmac.digest(secret, b"key:" + plain.encode("utf-8", "surrogatepass"), hashlib.sha256)


def pseudonym(text: str, *, secret: bytes, purpose: str) -> bytes:
    """16 bytes that stand for *text* in the store and cannot be turned back without the secret."""
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
