"""The server's secret: made once, whole, for its owner's eyes, and missed when it is another."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from pydantic import SecretStr
from tests.accounts.requests import closing, opening, record
from tests.hand_clock import HandClock
from tests.support.memory_store import MemoryStore

from trivec.accounts import FIXED, Accounts, KeyPlan
from trivec.accounts.keys import SECRET_FILE, server_secret
from trivec.accounts.stores import open_accounts, open_administration
from trivec.core.errors import SettingInvalid, StoreRefused, StoreUnavailable
from trivec.settings import Settings

GIVEN = "0123456789abcdef0123456789abcdef"


def test_it_is_made_at_the_first_use_for_its_owner_only(tmp_path: Path) -> None:
    made = server_secret(tmp_path, given=None)

    assert len(made) == 32
    assert (tmp_path / SECRET_FILE).stat().st_mode & 0o777 == 0o600
    assert server_secret(tmp_path, given=None) == made
    assert [file.name for file in tmp_path.iterdir()] == [SECRET_FILE]


def test_processes_that_start_together_agree_on_one(tmp_path: Path) -> None:
    with ThreadPoolExecutor(16) as threads:
        made = set(threads.map(lambda _: server_secret(tmp_path, given=None), range(64)))

    assert len(made) == 1


def test_the_environment_may_give_it_and_no_file_is_made(tmp_path: Path) -> None:
    assert server_secret(tmp_path, given=GIVEN) == GIVEN.encode()
    assert list(tmp_path.iterdir()) == []


def test_a_short_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingInvalid, match="at least 32"):
        server_secret(tmp_path, given=GIVEN[1:])


@pytest.mark.parametrize("content", ["", "beef", "not hexadecimal", "é"])
def test_a_damaged_file_is_refused_and_never_replaced(tmp_path: Path, content: str) -> None:
    (tmp_path / SECRET_FILE).write_text(content)

    with pytest.raises(SettingInvalid, match="restore it from a copy"):
        server_secret(tmp_path, given=None)
    assert (tmp_path / SECRET_FILE).read_text() == content


def test_a_store_is_refused_under_another_secret(tmp_path: Path) -> None:
    ours = Settings(data_dir=tmp_path)
    theirs = Settings(data_dir=tmp_path, secret=SecretStr(GIVEN))
    with open_administration(ours, clock=HandClock()) as administration:
        administration.create_key(KeyPlan("t"))

    with (
        pytest.raises(StoreRefused, match="another secret"),
        open_administration(theirs, clock=HandClock()),
    ):
        pytest.fail("a store was opened under another secret")
    with pytest.raises(StoreRefused, match="another secret"):
        open_accounts(theirs, clock=HandClock())


class Away(MemoryStore):
    """A store that was away at the start, and whose keys are of another secret."""

    def agree_secret_check(self, proposed: bytes) -> bytes:
        return b"of another secret"


async def test_a_store_that_comes_back_with_keys_of_another_secret_is_not_written() -> None:
    store = Away()
    accounts = Accounts(store, clock=HandClock(), secret=b"s" * 32)
    accounts.start()
    with pytest.raises(StoreUnavailable):
        await record(accounts, FIXED, opening(), closing())
    accounts.stop()
    assert not store.rows
    assert not accounts.writable()
    assert "made with another secret" in accounts.health().reason
