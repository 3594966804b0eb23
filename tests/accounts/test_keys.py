"""How plain keys look, and what is made of them."""

import pytest

from trivec.accounts import keys

PLAIN = keys.new_plain_key()


def test_a_new_key_is_well_formed_and_nobody_elses() -> None:
    made = {keys.new_plain_key() for _ in range(1000)}

    assert len(made) == 1000
    assert all(keys.is_well_formed(plain) for plain in made)
    assert {len(plain) for plain in made} == {52}
    assert {plain[:3] for plain in made} == {"tv_"}


@pytest.mark.parametrize("at", range(52), ids="wrong-at-{}".format)
def test_the_checksum_catches_one_wrong_character(at: int) -> None:
    wrong = "x" if PLAIN[at] != "x" else "y"

    assert not keys.is_well_formed(PLAIN[:at] + wrong + PLAIN[at + 1 :])


@pytest.mark.parametrize(
    "text",
    ["", "tv_", PLAIN[:-1], PLAIN + "0", PLAIN.upper(), "é" * 52],
    ids=["nothing", "prefix", "cut", "longer", "in-capitals", "not-ascii"],
)
def test_what_is_no_key(text: str) -> None:
    assert not keys.is_well_formed(text)


def test_a_digest_depends_on_the_key_and_on_the_secret() -> None:
    digests = {
        keys.digest(PLAIN, secret=b"s" * 32),
        keys.digest(PLAIN[:-1] + "!", secret=b"s" * 32),
        keys.digest(PLAIN, secret=b"t" * 32),
    }

    assert len(digests) == 3
    assert {len(digest) for digest in digests} == {32}


def test_any_string_has_a_digest() -> None:
    assert len(keys.digest("\ud800\x00'; DROP TABLE keys", secret=b"s" * 32)) == 32


def test_pseudonyms_of_different_purposes_are_strangers() -> None:
    one = keys.pseudonym("a", secret=b"s" * 32, purpose="user")
    two = keys.pseudonym("a", secret=b"s" * 32, purpose="check")

    assert one != two
    assert len(one) == 16


@pytest.mark.parametrize(
    ("number", "length", "text"),
    [(0, 3, "000"), (61, 1, "z"), (62, 2, "10"), (2**256 - 1, 43, None)],
    ids=["zero-is-padded", "last-digit", "carries", "32-bytes-fit"],
)
def test_base62(number: int, length: int, text: str | None) -> None:
    made = keys.base62(number, length)

    assert len(made) == length
    assert text in (None, made)
    assert sum(keys.ALPHABET.index(c) * 62**i for i, c in enumerate(reversed(made))) == number
