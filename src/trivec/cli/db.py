"""`trivec db`: the store's schema, and the archive of old ledger rows."""

import re
import sys
from contextlib import closing
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Annotated

import typer
from typer import Option

from trivec.cli.common import (
    AsJson,
    ConfigFile,
    DataDir,
    print_json,
    say,
    settings_of,
    store_refusals,
)
from trivec.core.errors import SettingInvalid

db_app = typer.Typer(help="Look after the store of keys and usage.", no_args_is_help=True)
CLEAR_LINE = "\r\x1b[K"


@db_app.command()
def upgrade(data_dir: DataDir = None, config: ConfigFile = None) -> None:
    """Bring the schema to the one this version reads; needed on Postgres, automatic on SQLite."""
    from trivec.accounts.stores import open_store

    settings = settings_of(data_dir, config)
    with store_refusals(settings, creates=True), closing(open_store(settings)) as store:
        before = store.revision()
        store.upgrade()
        after = store.revision()
    if before == after:
        say(f"The schema is up to date, at revision {after}.")
    else:
        say(f"The schema went from {before or 'nothing'} to revision {after}.")


@db_app.command()
def archive(
    before: Annotated[str, Option(help="Move the rows before this UTC day, as 2026-11-01.")],
    to: Annotated[Path | None, Option(help="The file, by default in the data folder.")] = None,
    data_dir: DataDir = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Move old ledger rows into a gzip file of JSON lines; the totals of their days stay."""
    from trivec.accounts.archive import ArchivePlan, archive
    from trivec.accounts.stores import open_store
    from trivec.accounts.utc import DAY_US

    today = datetime.now(UTC).date()
    try:
        day = date.fromisoformat(before if re.fullmatch(r"[\d-]{10}", before, re.ASCII) else "")
    except ValueError:
        raise SettingInvalid(f"--before is {before!r}; give a day such as 2026-11-01") from None
    if not date(1970, 1, 1) <= day <= today:  # the rows of later days are still being written
        raise SettingInvalid(f"--before is {day}; it is from 1970 to today, {today} in UTC")

    def show_progress(rows: int) -> None:
        if sys.stderr.isatty():
            print(f"{CLEAR_LINE}{rows:,} rows moved", end="", file=sys.stderr, flush=True)

    settings = settings_of(data_dir, config)
    file = to or settings.data_dir / f"ledger-until-{day}.jsonl.gz"
    plan = ArchivePlan((day - date(1970, 1, 1)).days * DAY_US, file, settings.data_dir)
    with store_refusals(settings), closing(open_store(settings)) as store:
        try:
            done = archive(store, plan, told=show_progress)
        finally:
            if sys.stderr.isatty():
                print(CLEAR_LINE, end="", file=sys.stderr, flush=True)
    if as_json:
        written = None if done.file is None else str(done.file)
        print_json(
            {"before": str(day), "rows": done.rows, "bytes": done.byte_count, "file": written}
        )
    elif done.file is None and done.rows == 0:
        say(f"There is no ledger row before {day} to move.")
    else:
        where = "" if done.file is None else f" into {done.file} ({done.byte_count:,} bytes)"
        say(f"Moved {done.rows:,} ledger rows from before {day}{where}.")
