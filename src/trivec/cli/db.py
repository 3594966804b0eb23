"""`trivec db`: the schema of the store, and its old ledger rows."""

import re
import sys
from contextlib import closing
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Annotated

import typer

from trivec.cli.store import (
    AsJson,
    ConfigFile,
    DataDir,
    check_store_is_there,
    print_json,
    say,
    settings_of,
    telling_what_is_away,
)
from trivec.core.errors import SettingInvalid

db_app = typer.Typer(help="Look after the store: its schema, its size.", no_args_is_help=True)
CLEAR_LINE = "\r\x1b[K"


@db_app.command()
def upgrade(data_dir: DataDir = None, config: ConfigFile = None) -> None:
    """Bring the schema to the one this version reads; needed on Postgres, automatic on SQLite."""
    from trivec.accounts.stores import open_store

    settings = settings_of(data_dir, config)
    with telling_what_is_away(settings), closing(open_store(settings)) as store:
        before = store.revision()
        store.upgrade()
        after = store.revision()
    if before == after:
        say(f"The schema is up to date, at revision {after}.")
    else:
        say(f"The schema went from {before or 'nothing'} to revision {after}.")


@db_app.command()
def archive(
    before: Annotated[
        str, typer.Option("--before", help="Move the rows before this UTC day, as 2026-11-01.")
    ],
    to: Annotated[
        Path | None,
        typer.Option("--to", help="The file; ledger-until-DATE.jsonl.gz of the data folder."),
    ] = None,
    data_dir: DataDir = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Move old ledger rows into a gzip file of JSON lines; the totals of their days stay."""
    from trivec.accounts.archive import Plan, archive
    from trivec.accounts.stores import open_store
    from trivec.accounts.utc import DAY_US

    day = _past_day(before)
    settings = settings_of(data_dir, config)
    check_store_is_there(settings)
    file = to or settings.data_dir / f"ledger-until-{day}.jsonl.gz"
    before_us = (day - date(1970, 1, 1)).days * DAY_US
    with telling_what_is_away(settings), closing(open_store(settings)) as store:
        try:
            done = archive(store, Plan(before_us, file, settings.data_dir), told=_show_progress)
        finally:
            if sys.stderr.isatty():
                print(CLEAR_LINE, end="", file=sys.stderr, flush=True)
    if as_json:
        print_json(
            {
                "before": day.isoformat(),
                "rows": done.rows,
                "bytes": done.byte_count,
                "file": None if done.file is None else str(done.file),
            }
        )
    elif done.file is None and done.rows == 0:
        say(f"There is no ledger row before {day} to move.")
    else:
        where = "" if done.file is None else f" into {done.file} ({done.byte_count:,} bytes)"
        say(f"Moved {done.rows:,} ledger rows from before {day}{where}.")


def _past_day(text: str) -> date:
    """Raises `SettingInvalid` for what is no day, or one whose rows are still being written."""
    try:
        if not re.fullmatch(r"\d{4}-\d\d-\d\d", text, re.ASCII):
            raise ValueError
        day = date.fromisoformat(text)
    except ValueError:
        raise SettingInvalid(f"--before is {text!r}; give a day such as 2026-11-01") from None
    today = datetime.now(UTC).date()
    if not date(1970, 1, 1) <= day <= today:
        raise SettingInvalid(f"--before is {day}; it is from 1970 to today, {today} in UTC")
    return day


def _show_progress(rows: int) -> None:
    if sys.stderr.isatty():
        print(f"{CLEAR_LINE}{rows:,} rows moved", end="", file=sys.stderr, flush=True)
