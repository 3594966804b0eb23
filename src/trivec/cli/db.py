"""`trivec db`: the store's schema, and the archive of old ledger rows."""

from contextlib import closing, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from typer import Option

from trivec.accounts.utc import EPOCH, microseconds
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

app = typer.Typer(
    help="Look after the store of keys and usage.", no_args_is_help=True, add_completion=False
)


@app.command()
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


@app.command()
def archive(
    before: Annotated[str, Option(help="Move the rows before this UTC day, as 2026-11-01.")],
    to: Annotated[Path | None, Option(help="The file, by default in the data folder.")] = None,
    data_dir: DataDir = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Move old ledger rows into a gzip file of JSON lines; the totals of their days stay."""
    from trivec.accounts.archive import ArchiveRun
    from trivec.accounts.stores import open_store

    now = datetime.now(UTC)
    day: datetime | None = None
    with suppress(ValueError):
        day = datetime.strptime(before, "%Y-%m-%d").replace(tzinfo=UTC)
    if day is None or not EPOCH <= day <= now:  # the rows of later days are still being written
        raise SettingInvalid(
            f"--before is {before!r}; give a day from 1970 to today, {now:%Y-%m-%d} in UTC"
        )
    settings = settings_of(data_dir, config)
    file = to or settings.data_dir / f"ledger-until-{day:%Y-%m-%d}.jsonl.gz"
    with (
        store_refusals(settings),
        closing(open_store(settings)) as store,
        Console(stderr=True).status("") as status,  # silent where that is no terminal
    ):
        done = ArchiveRun(
            store,
            microseconds(day),
            file,
            settings.data_dir,
            told=lambda rows: status.update(f"{rows:,} rows moved"),
        ).run()
    if as_json:
        file_name = None if done.file is None else str(done.file)
        moved = {"rows": done.rows, "bytes": done.byte_count, "file": file_name}
        print_json({"before": f"{day:%Y-%m-%d}", **moved})
    elif done.file is None and done.rows == 0:
        say(f"There is no ledger row before {before} to move.")
    else:
        where = "" if done.file is None else f" into {done.file} ({done.byte_count:,} bytes)"
        say(f"Moved {done.rows:,} ledger rows from before {before}{where}.")
