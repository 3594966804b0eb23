"""Where the first key is told: a terminal, or a file that nobody else may read."""

import sys
from pathlib import Path

import pytest

from trivec.accounts import Key, NewKey, RateLimits, Scope
from trivec.cli.serve import Greeting
from trivec.settings import Settings

PLAIN = "tv_" + "x" * 49
NEW = NewKey(Key("key_1", "first", frozenset(Scope), None, RateLimits(), created_us=0), PLAIN)


def told(data_dir: Path) -> str:
    said: list[str] = []
    Greeting(Settings(data_dir=data_dir), port=8000, say=said.append).first_key(NEW)
    return "\n".join(said)


def test_a_log_never_holds_the_first_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("")
    file = tmp_path / "data" / "first-key"
    file.parent.mkdir()
    file.symlink_to(elsewhere)
    said = told(file.parent)
    assert PLAIN not in said
    assert str(file) in said
    assert file.read_text() == PLAIN + "\n"
    assert file.stat().st_mode & 0o777 == 0o600
    assert elsewhere.read_text() == "", "a link that lay there is replaced, not followed"


def test_a_terminal_is_shown_the_first_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert PLAIN in told(tmp_path)
    assert not (tmp_path / "first-key").exists()


def test_a_file_that_cannot_be_written_ends_in_a_next_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False)
    (tmp_path / "first-key").mkdir()
    said = told(tmp_path)
    assert PLAIN not in said
    assert "trivec keys rotate first" in said
