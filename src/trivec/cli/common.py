"""What several commands share: options, access to the store, and how things are printed."""

import json
import os
import re
import shutil
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, TypeAlias
from urllib.parse import urlsplit

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text
from typer import Option

from trivec.core.errors import SettingInvalid, StoreRefused, StoreUnavailable
from trivec.settings import Settings, load_settings

if TYPE_CHECKING:
    from trivec.accounts.administration import Administration

PIPED_COLUMNS = 10_000  # no terminal to fit into: rows stay whole
FOLDED_MIN = 12  # characters that a folded column must have left, or others go
UNITS = {"m": "minutes", "h": "hours", "d": "days", "w": "weeks"}

DataDir: TypeAlias = Annotated[
    str | None, Option(help=Settings.model_fields["data_dir"].description)
]
ConfigFile: TypeAlias = Annotated[
    str | None, Option("--config", help="TOML file with any of the settings.")
]
AsJson: TypeAlias = Annotated[bool, Option("--json", help="Print JSON instead of a table.")]

Cell: TypeAlias = str | float | None  # text in rich's markup, or a number
Row: TypeAlias = dict[str, Cell]  # by column


def settings_of(data_dir: str | None, config: str | None = None, **flags: object) -> Settings:
    """The settings a server with these options would have. Raises `SettingInvalid`."""
    return load_settings({"data_dir": data_dir, "config": config, **flags}, os.environ, warn=say)


@contextmanager
def administration(settings: Settings, *, creates: bool = False) -> "Iterator[Administration]":
    """The store's keys and usage, until the block ends. Raises `StoreRefused` in one line."""
    from trivec.accounts.stores import open_administration
    from trivec.core.clock import SystemClock

    with (
        store_refusals(settings, creates=creates),
        open_administration(settings, clock=SystemClock()) as books,
    ):
        yield books


@contextmanager
def store_refusals(settings: Settings, *, creates: bool = False) -> Iterator[None]:
    """Turn a store that is missing or away into `StoreRefused`: one line with the next step.

    An SQLite store is made only where *creates*: a second one beside the server's own would hold
    keys that open nothing.
    """
    from trivec.accounts.stores import sqlite_file

    file = sqlite_file(settings)
    if not creates and file is not None and not file.exists():
        raise StoreRefused(
            f"there is no store in {settings.data_dir}; name the server's own data folder with "
            "--data-dir, or make a store with: trivec serve, or trivec keys create --create"
        )
    try:
        yield
    except StoreUnavailable as fault:
        where, next_step = str(settings.data_dir), "try again"
        if settings.database_url is not None:
            address = urlsplit(settings.database_url.get_secret_value())
            where = f"{address.hostname}:{address.port or 5432}"
            next_step = "is it running, and may this machine reach it?"
        cause = " ".join(str(fault.__cause__ or fault).split())
        raise StoreRefused(f"the store at {where} cannot be used: {cause}; {next_step}") from fault


def instant(text: str, *, option: str, ahead: bool) -> int:
    """Microseconds since the epoch for a date, an instant, or a span such as 30d from now.

    *ahead* says whether a span lies in the future. Without a zone, UTC. Raises `SettingInvalid`.
    """
    from trivec.accounts.utc import microseconds

    try:
        if span := re.fullmatch(r"(\d{1,6})([mhdw])", text):
            length = timedelta(**{UNITS[span[2]]: int(span[1])})
            return microseconds(datetime.now(UTC) + (length if ahead else -length))
        return microseconds(datetime.fromisoformat(text))
    except (ValueError, OverflowError):
        raise SettingInvalid(
            f"{option} is {text!r}; give a date such as 2026-11-22, an instant such as "
            "2026-11-22T17:30Z, or a span such as 30d or 12h"
        ) from None


def say(line: str) -> None:
    """Print a line for people; standard output is for data."""
    print(line, file=sys.stderr)


def print_json(value: object) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def styled(text: str, style: str = "none") -> str:
    """*text* in a style of rich's, as it is: its brackets are no markup."""
    return f"[{style}]{escape(text)}[/]"


def print_table(
    rows: Sequence[Row], *, folded: Collection[str] = (), spare: Sequence[str] = ()
) -> None:
    """Print *rows*, all of the same columns.

    As wide as the terminal: text in the columns *folded* may take several lines, and where that is
    not enough the columns *spare* are left out, one after another. A pipe gets whole rows.
    """

    def shown(cell: Cell) -> str:
        if cell is None or isinstance(cell, str):
            return cell or ""
        return f"{cell:,}" if isinstance(cell, int) else f"{cell:,.4g}"

    def width(column: str) -> int:
        cells = [column, *(Text.from_markup(shown(row[column])).plain for row in rows)]
        longest = max(Text(line).cell_len for cell in cells for line in cell.split("\n"))
        return min(longest, FOLDED_MIN) if column in folded else longest

    columns = list(rows[0])
    is_terminal = sys.stdout.isatty()
    console = Console(width=shutil.get_terminal_size().columns if is_terminal else PIPED_COLUMNS)
    for name in spare:
        if name in columns and sum(width(one) + 3 for one in columns) > console.width:
            columns.remove(name)
    table = Table(box=SIMPLE_HEAD, header_style="bold", pad_edge=False)
    for column in columns:
        table.add_column(
            column,
            justify="right"
            if any(isinstance(row[column], int | float) for row in rows)
            else "left",
            no_wrap=column not in folded,
            overflow="fold",  # half a name may be another key's
        )
    for row in rows:
        table.add_row(*(shown(row[column]) for column in columns))
    console.print(table)
