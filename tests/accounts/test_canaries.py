"""What must never be found again: plain keys and what clients call themselves, anywhere we write."""

import asyncio
import logging
import secrets
from pathlib import Path

import pytest
from pydantic import SecretStr
from tests.accounts.processes import long_or_short
from tests.accounts.requests import acquire, closing, opening

from trivec.accounts import FIXED, Accounts, KeyPlan
from trivec.accounts.stores import open_accounts
from trivec.core.clock import SystemClock
from trivec.core.errors import KeyInvalid
from trivec.settings import Settings

CANARIES = long_or_short(long=1_000, short=100)
FIXED_KEY = "fixed-" + secrets.token_hex(16)
HOSTILE = [
    "' OR 1=1 --",
    '"; DROP TABLE keys; --',
    "x' UNION SELECT digest FROM secrets --",
    "a\r\nSet-Cookie: x=1",
    "a\nINFO forged line",
    "\x00",
    "\u202eevil",
    "😀" * 20,
    "İıſß",
    "%s%n{0}${jndi:ldap://x}",
    "../../etc/passwd",
    "\ud800",
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


def settings(folder: Path) -> Settings:
    return Settings(data_dir=folder, api_key=SecretStr(FIXED_KEY))


async def use(accounts: Accounts, canary: str) -> str:
    """Make and use a key; the client names its user *canary*. Returns the plain key."""
    new = await accounts.create_key(KeyPlan(f"name-{secrets.token_hex(4)}"))
    caller = await accounts.identify(new.plain)
    booking = await acquire(accounts, caller, opening())
    await booking.close(closing(user=canary))
    return new.plain


def all_of(folder: Path) -> bytes:
    return b"".join(file.read_bytes() for file in sorted(folder.iterdir()))


async def refusals_of(accounts: Accounts, bearers: list[str]) -> set[str]:
    """At once: wrong keys share a read, and one after another they would wait for one each."""
    told = await asyncio.gather(*map(accounts.identify, bearers), return_exceptions=True)
    assert {type(one) for one in told} == {KeyInvalid}
    return {str(one) for one in told}


async def test_no_key_and_no_name_of_a_client_is_written_anywhere(
    folder: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    accounts = open_accounts(settings(folder), clock=SystemClock())
    accounts.start()
    planted = [FIXED_KEY]
    for _ in range(CANARIES):
        canary = secrets.token_hex(16)
        planted += [canary, await use(accounts, canary)]
    await refusals_of(accounts, planted[1::2])
    accounts.stop()

    printed = capfd.readouterr()
    written = all_of(folder) + (caplog.text + printed.out + printed.err).encode()
    assert len(planted) == 2 * CANARIES + 1
    assert [text for text in planted if text.encode() in written] == []


async def test_hostile_bearers_are_nobody_and_are_never_repeated(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    accounts = open_accounts(settings(folder), clock=SystemClock())
    accounts.start()
    bearers = [
        f"{head}{number}{tail}" for head in HOSTILE for tail in HOSTILE for number in range(4)
    ]
    refusals = await refusals_of(accounts, bearers)
    assert await accounts.identify(FIXED_KEY) == FIXED
    accounts.stop()

    assert len(bearers) >= 500
    assert refusals == {str(KeyInvalid())}
    assert [bearer for bearer in bearers if bearer in caplog.text] == []
