"""`trivec keys`, `trivec usage` and `trivec db`, as somebody at a terminal or a script uses them."""

import csv
import io
import json
import os
import pty
import re
import socket
import sqlite3
import subprocess
import termios
from collections.abc import Callable
from contextlib import closing as closing_file
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from tests.accounts.postgres import PostgresServer
from tests.accounts.requests import acquire, closing, opening
from tests.accounts.shelf import latest_sqlite
from tests.process.server import TRIVEC
from typer.testing import CliRunner

from trivec.accounts.keys import new_plain_key
from trivec.accounts.stores import open_accounts
from trivec.accounts.stores.engines import SQLITE_FILE
from trivec.cli import app
from trivec.core.clock import SystemClock
from trivec.core.errors import FieldInvalid, ResourceUnknown, SettingInvalid, StoreRefused
from trivec.settings import Settings


@dataclass(frozen=True)
class Said:
    """What a command printed."""

    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Trivec = Callable[..., Said]


@pytest.fixture
def trivec(tmp_path: Path, trivec_in_a_new_folder: Trivec) -> Trivec:
    """Runs a command on a data folder with an empty store; its refusal is raised."""
    (tmp_path / SQLITE_FILE).write_bytes(latest_sqlite())
    return trivec_in_a_new_folder


@pytest.fixture
def trivec_in_a_new_folder(tmp_path: Path) -> Trivec:
    """The same, where nothing was made yet."""

    def run(*words: str, **environ: str) -> Said:
        result = CliRunner().invoke(
            app, [*words, "--data-dir", str(tmp_path)], env=environ, catch_exceptions=False
        )
        assert result.exit_code == 0, result.output
        return Said(result.stdout, result.stderr)

    return run


@pytest.mark.parametrize(
    "words",
    [
        ["keys", "list"],
        ["usage"],
        ["keys", "revoke", "t"],
        ["keys", "create", "--name", "t"],
        ["db", "archive", "--before", "2026-01-01"],
        ["db", "upgrade"],
    ],
)
def test_no_command_makes_a_second_store_by_itself(
    trivec_in_a_new_folder: Trivec, tmp_path: Path, words: list[str]
) -> None:
    with pytest.raises(StoreRefused, match=r"there is no store in .*--data-dir"):
        trivec_in_a_new_folder(*words)
    assert list(tmp_path.iterdir()) == []


def test_a_store_is_made_where_that_is_asked_for(trivec_in_a_new_folder: Trivec) -> None:
    assert trivec_in_a_new_folder("keys", "create", "--name", "t", "--create").out.startswith("tv_")


def test_a_postgres_that_is_away_is_named_with_its_cause(trivec: Trivec) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    url = f"postgresql+psycopg://trivec:hush@127.0.0.1:{port}/trivec"
    with pytest.raises(StoreRefused, match=f"127.0.0.1:{port} cannot be used: .*refused") as said:
        trivec("keys", "list", TRIVEC_DATABASE_URL=url)
    assert "hush" not in str(said.value)
    assert "\n" not in str(said.value)


def test_a_key_keeps_what_becomes_of_long_texts(trivec: Trivec) -> None:
    trivec("keys", "create", "--name", "t", "--truncate", "end")
    assert trivec("keys", "show", "t", "--json").json["truncate"] == "end"
    assert re.search("truncate +end", trivec("keys", "show", "t").out)


def test_a_shell_catches_the_key_and_the_person_is_told_to_keep_it(trivec: Trivec) -> None:
    said = trivec("keys", "create", "--name", "t")

    assert said.out.startswith("tv_")
    assert len(said.out.split()) == 1
    assert "only time" in said.err
    assert said.out.strip() not in said.err


def test_a_script_is_told_three_things_about_a_new_key(trivec: Trivec) -> None:
    made = trivec("keys", "create", "--name", "t", "--json").json

    assert set(made) == {"id", "name", "key"}
    assert made["name"] == "t"
    assert trivec("keys", "show", made["key"], "--json").json["id"] == made["id"]


def test_everything_that_can_be_said_of_a_key(trivec: Trivec) -> None:
    trivec(
        *("keys", "create", "--name", "t", "--scope", "admin", "--scope", "embed"),
        *("--model", "baai/bge-m3", "--rpm", "600", "--tpm", "1_000_000"),
        *("--expires", "2099-01-02"),
    )

    (key,) = trivec("keys", "list", "--json").json

    assert key["scopes"] == ["admin", "embed"]
    assert key["models"] == ["baai/bge-m3"]
    assert (key["requests_per_minute"], key["tokens_per_minute"]) == (600, 1_000_000)
    assert (key["expires"], key["revoked"]) == ("2099-01-02T00:00:00Z", None)
    assert [set(secret) for secret in key["secrets"]] == [{"first", "last", "created", "expires"}]


def test_a_model_that_nobody_knows_is_warned_of(trivec: Trivec) -> None:
    known = trivec("keys", "create", "--name", "a", "--model", "BAAI/bge-m3")
    unknown = trivec("keys", "create", "--name", "b", "--model", "BAAI/BGE-M3")

    assert "warning" not in known.err
    assert "no model called BAAI/BGE-M3" in unknown.err
    assert unknown.out.startswith("tv_")


@pytest.mark.parametrize("by", ["name", "id", "key"])
def test_a_key_is_addressed_by(trivec: Trivec, by: str) -> None:
    made = trivec("keys", "create", "--name", "t", "--json").json

    assert trivec("keys", "revoke", made[by], "--json").json["revoked"] is not None


def test_the_list_is_a_table_without_the_revoked(trivec: Trivec) -> None:
    for name in ("kept [red]", "gone"):
        trivec("keys", "create", "--name", name, "--rpm", "1200")
    trivec("keys", "revoke", "gone")

    table = trivec("keys", "list").out

    assert "kept [red]" in table
    assert "1,200" in table
    assert "gone" not in table
    assert "gone" in trivec("keys", "list", "--all").out


@pytest.mark.process
def test_the_list_fits_into_a_terminal_of_80_columns(trivec: Trivec, tmp_path: Path) -> None:
    name = "-a-name-as-long-as-one-may-be-" + "x" * 33
    for number, models in enumerate(([], ["--model", "sentence-transformers/all-minilm-l6-v2"])):
        trivec(
            *(
                "keys",
                "create",
                "--name",
                f"{number}{name}",
                "--scope",
                "admin",
                "--scope",
                "embed",
            ),
            *("--rpm", "1000000000", "--tpm", "1000000000", "--expires", "2099-01-02", *models),
        )

    shown = at_a_real_terminal(80, "keys", "list", "--data-dir", str(tmp_path))

    assert max(len(line) for line in shown.splitlines()) <= 80
    assert "…" not in shown
    assert shown.count("1,000,000,000") == 4
    assert shown.count("live") == 2


def at_a_terminal(columns: int, *words: str) -> str:
    """What a command prints where its output is a terminal of that width."""
    shown = Terminal()
    with patch.dict(os.environ, COLUMNS=str(columns)), redirect_stdout(shown):
        assert app(words, standalone_mode=False) is None
    return re.sub(r"\x1b\[[0-9;]*m", "", shown.getvalue())


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def at_a_real_terminal(columns: int, *words: str) -> str:
    screen, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, columns))
    environ = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}
    with subprocess.Popen([TRIVEC, *words], stdin=theirs, stdout=theirs, env=environ) as process:
        os.close(theirs)
        said = b""
        with suppress(OSError):  # how a terminal says that nobody is left at its other end
            while more := os.read(screen, 65_536):
                said += more
        os.close(screen)
    assert process.returncode == 0
    return re.sub(r"\x1b\[[0-9;]*m", "", said.decode()).replace("\r", "")


LONG_NAME = "a-name-as-long-as-one-may-be-" + "x" * 35
LONG_MODEL = "sentence-transformers/paraphrase-multilingual-mpnet-base-v2-" + "y" * 60


@pytest.fixture
def much_used(trivec: Trivec, tmp_path: Path) -> Path:
    """The data folder of a key with a long name, used for more than any table was made for."""
    made = trivec("keys", "create", "--name", LONG_NAME, "--json").json
    with closing_file(sqlite3.connect(tmp_path / SQLITE_FILE)) as books:
        books.executemany(
            "INSERT INTO daily (key_id, model, day, part, requests, failed, tokens) "
            "VALUES (?, ?, 20000, 0, 1000000000000, 1000000000000, 1000000000000000)",
            [(made["id"], LONG_MODEL), (made["id"], "m"), ("fixed", "m")],
        )
        books.commit()
    return tmp_path


@pytest.mark.parametrize("columns", [40, 80])
@pytest.mark.parametrize(
    ("by", "group", "least", "tokens"),
    [
        pytest.param("key", LONG_NAME, 12, "2,000,000,000,000,000", id="key"),
        pytest.param("model", LONG_MODEL, 12, "1,000,000,000,000,000", id="model"),
        pytest.param("day", "2024-10-04", 10, "3,000,000,000,000,000", id="day"),
    ],
)
def test_usage_fits_into_a_terminal_with_nothing_cut(
    much_used: Path, columns: int, by: str, group: str, least: int, tokens: str
) -> None:
    shown = at_a_terminal(columns, "usage", "--by", by, "--data-dir", str(much_used))

    lines = shown.splitlines()
    assert max(len(line) for line in lines) <= columns
    assert "…" not in shown
    assert tokens in shown
    (first,) = [n for n, line in enumerate(lines) if line.strip().startswith(group[:least])]
    folded = [line.split()[0] for line in lines[first:] if line.strip()]
    assert "".join(folded).startswith(group)


def test_usage_leaves_out_the_id_first_and_only_where_it_does_not_fit(much_used: Path) -> None:
    def heads(columns: int) -> list[str]:
        shown = at_a_terminal(columns, "usage", "--data-dir", str(much_used))
        return next(line.split() for line in shown.splitlines() if "NAME" in line)

    assert heads(120) == ["NAME", "KEY", "REQUESTS", "FAILED", "TOKENS", "SHARE"]
    assert heads(80) == ["NAME", "REQUESTS", "FAILED", "TOKENS"]
    assert heads(40) == ["NAME", "TOKENS"]


@pytest.mark.parametrize("words", [["usage"], ["usage", "--by", "model"], ["keys", "list"]])
def test_a_pipe_gets_whole_rows(trivec: Trivec, much_used: Path, words: list[str]) -> None:
    name = LONG_MODEL if "model" in words else LONG_NAME
    assert name in trivec(*words).out


def test_an_empty_list_says_what_to_do_and_prints_nothing(trivec: Trivec) -> None:
    said = trivec("keys", "list")

    assert said.out == ""
    assert "trivec keys create" in said.err


def test_a_rotation_prints_a_second_key_and_says_how_long_the_first_goes_on(
    trivec: Trivec,
) -> None:
    first = trivec("keys", "create", "--name", "t").out.strip()
    said = trivec("keys", "rotate", "t", "--overlap", "1h", "--json")

    key = trivec("keys", "show", "t", "--json").json
    assert said.json["key"] != first
    assert [secret["first"] for secret in key["secrets"]] == [first[:8], said.json["key"][:8]]
    assert key["secrets"][0]["expires"] is not None
    assert key["secrets"][1]["expires"] is None
    assert "works until" in said.err


def test_a_key_that_is_not_known_is_not_shown_in_full(trivec: Trivec) -> None:
    """A refusal may end up in a log, and a key with a typo is nearly a secret."""
    plain = trivec("keys", "create", "--name", "t").out.strip()
    for wrong in (f"{plain[:-1]}{'a' if plain[-1] != 'a' else 'b'}", new_plain_key()):
        with pytest.raises(ResourceUnknown, match=f"no key {wrong[:8]}…") as refused:
            trivec("keys", "show", wrong)
        assert wrong[9:] not in str(refused.value)


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        pytest.param(["keys", "show", "none"], ResourceUnknown, "no key none", id="unknown"),
        pytest.param(["keys", "show", "tv_typo"], ResourceUnknown, "typo in it", id="a-typo"),
        pytest.param(
            ["keys", "create", "--name", " "], FieldInvalid, "printable", id="a-blank-name"
        ),
        pytest.param(
            ["keys", "create", "--name", "t", "--rpm", "0"], FieldInvalid, "1 to", id="no-allowance"
        ),
        pytest.param(
            ["keys", "create", "--name", "t", "--expires", "soon"], SettingInvalid, "30d", id="when"
        ),
        pytest.param(
            ["keys", "create", "--name", "t", "--expires", "2020-01-01"],
            FieldInvalid,
            "expired",
            id="an-expiry-in-the-past",
        ),
        pytest.param(
            ["keys", "create", "--name", "t", "--expires", "9999-12-31T23:59-12:00"],
            SettingInvalid,
            "30d",
            id="after-the-last-year",
        ),
        pytest.param(
            ["keys", "create", "--name", "t", "--expires", "999999w"],
            SettingInvalid,
            "30d",
            id="a-span-without-an-end",
        ),
        pytest.param(["usage", "--since", "999999w"], SettingInvalid, "30d", id="before-time"),
        pytest.param(["usage", "--json", "--csv"], SettingInvalid, "exclude", id="two-formats"),
        pytest.param(["usage", "--since", "then"], SettingInvalid, "2026", id="since-when"),
    ],
)
def test_a_refusal_says_what_to_do(
    trivec: Trivec, words: list[str], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        trivec(*words)


@pytest.mark.parametrize(
    ("words", "choices"),
    [
        pytest.param(["usage", "--by", "moon"], ["key", "model", "day"], id="usage-by"),
        pytest.param(
            ["keys", "create", "--name", "t", "--scope", "root"], ["embed", "admin"], id="scope"
        ),
        pytest.param(
            ["keys", "create", "--name", "t", "--truncate", "middle"],
            ["none", "end", "start"],
            id="truncate",
        ),
    ],
)
def test_a_word_that_is_no_choice_is_refused_with_the_choices(
    words: list[str], choices: list[str]
) -> None:
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2
    assert all(f"'{choice}'" in result.output for choice in choices)


def test_one_key_is_shown_whole_and_without_its_secret(trivec: Trivec) -> None:
    key = trivec("keys", "create", "--name", "a [red] name", "--expires", "2099-01-02").out.strip()
    shown = trivec("keys", "show", key).out
    assert re.search(r"name +a \[red\] name\n", shown)
    assert re.search("state +live\n", shown)
    assert re.search("expires +2099-01-02T00:00:00Z\n", shown)
    assert re.search("models +all\n", shown)
    assert f"{key[:8]}…" in shown
    assert key not in shown


def test_a_name_is_taken_until_its_key_is_revoked(trivec: Trivec) -> None:
    trivec("keys", "create", "--name", "t")
    with pytest.raises(FieldInvalid, match="already"):
        trivec("keys", "create", "--name", "t")
    trivec("keys", "revoke", "t")

    trivec("keys", "create", "--name", "t")

    assert len(trivec("keys", "list", "--all", "--json").json) == 2
    assert trivec("keys", "show", "t", "--json").json["revoked"] is None


@pytest.fixture
async def used(trivec: Trivec, tmp_path: Path) -> list[str]:
    """Two keys' ids; one was billed 2,000 tokens in two requests, the other had one failure."""
    busy, idle = (
        trivec("keys", "create", "--name", name, "--json").json for name in ("busy", "idle")
    )
    accounts = open_accounts(Settings(data_dir=tmp_path), clock=SystemClock())
    accounts.start()
    for made, status, tokens in [(busy, 200, 1500), (busy, 200, 500), (idle, 400, 0)]:
        caller = await accounts.identify(made["key"])
        await (await acquire(accounts, caller, opening())).close(closing(status, tokens))
    accounts.stop()
    return [busy["id"], idle["id"]]


def test_usage_by_key(trivec: Trivec, used: list[str]) -> None:
    rows = trivec("usage", "--by", "key", "--json").json

    assert rows == [  # the busiest first
        {"key": used[0], "name": "busy", "requests": 2, "failed": 0, "tokens": 2000, "share": 1.0},
        {"key": used[1], "name": "idle", "requests": 1, "failed": 1, "tokens": 0, "share": 0.0},
    ]


@pytest.mark.usefixtures("used")
def test_usage_by_model_and_by_day(trivec: Trivec) -> None:
    by_model = trivec("usage", "--by", "model", "--json").json
    by_day = trivec("usage", "--by", "day", "--json").json

    assert by_model == [{"model": "m", "requests": 3, "failed": 1, "tokens": 2000, "share": 1.0}]
    assert [set(row) for row in by_day] == [{"day", "requests", "failed", "tokens", "share"}]
    assert sum(row["tokens"] for row in by_day) == 2000


@pytest.mark.usefixtures("used")
def test_usage_as_csv_and_as_a_table(trivec: Trivec) -> None:
    rows = list(csv.DictReader(io.StringIO(trivec("usage", "--csv").out)))
    table = trivec("usage").out

    assert {row["name"]: row["tokens"] for row in rows} == {"busy": "2000", "idle": "0"}
    assert "2,000" in table
    assert "total" in table
    assert "100.0%" in table


@pytest.mark.usefixtures("used")
def test_usage_of_a_time_or_a_key(trivec: Trivec) -> None:
    def tokens(*words: str) -> int:
        return sum(row["tokens"] for row in trivec("usage", "--json", *words).json)

    assert tokens("--since", "1h") == 2000
    assert tokens("--until", "1h") == 0
    assert tokens("--key", "idle") == 0
    assert tokens("--key", "busy") == 2000


@pytest.mark.usefixtures("used")
def test_an_archive_of_what_is_old(trivec: Trivec, tmp_path: Path) -> None:
    said = trivec("db", "archive", "--before", "2026-01-02")
    assert "no ledger row before 2026-01-02" in said.err

    with sqlite3.connect(tmp_path / SQLITE_FILE) as books:
        books.execute(
            "INSERT INTO ledger (time_us, request_id, key_id, input_count, token_count, status, "
            "duration_us) VALUES (5, 'r1', 'key_a', 1, 7, 200, 9)"
        )
    books.close()
    made = trivec("db", "archive", "--before", "2026-01-02", "--json").json
    file = tmp_path / "ledger-until-2026-01-02.jsonl.gz"
    assert made == {
        "before": "2026-01-02",
        "rows": 1,
        "bytes": file.stat().st_size,
        "file": str(file),
    }
    assert "Moved 0 ledger rows" in trivec("db", "archive", "--before", "2026-01-02").err


@pytest.mark.parametrize("day", ["2026-13-01", "yesterday", "20260101", "9999-01-01", "1969-12-31"])
def test_an_archive_of_no_day_or_of_the_future_is_refused(trivec: Trivec, day: str) -> None:
    with pytest.raises(SettingInvalid, match=f"--before is .?{day}"):
        trivec("db", "archive", "--before", day)


def test_the_schema_is_brought_up_to_date_on_postgres(
    trivec: Trivec, postgres: PostgresServer
) -> None:
    url = postgres.new_database()

    first = trivec("db", "upgrade", TRIVEC_DATABASE_URL=url)
    second = trivec("db", "upgrade", TRIVEC_DATABASE_URL=url)
    trivec("keys", "create", "--name", "t", TRIVEC_DATABASE_URL=url)

    assert "from nothing" in first.err
    assert "up to date" in second.err
    listed = trivec("keys", "list", "--json", TRIVEC_DATABASE_URL=url).json
    assert [key["name"] for key in listed] == ["t"]
    with pytest.raises(ResourceUnknown):  # Postgres itself takes no such text
        trivec("keys", "show", "t\0", TRIVEC_DATABASE_URL=url)
