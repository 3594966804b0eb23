"""What the commands that touch the store share: their options, their instants, their tables."""

import json
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias
from urllib.parse import urlsplit

import typer

from trivec.core.errors import SettingInvalid, StoreRefused, StoreUnavailable
from trivec.settings import Settings, load_settings

if TYPE_CHECKING:
    from rich.table import Column, Table

    from trivec.accounts.administration import Administration

PIPED_COLUMNS = 200  # where there is no terminal to fit into
FOLDED_MIN = 12  # what a column of text must have left, or others go
UNITS = {"m": "minutes", "h": "hours", "d": "days", "w": "weeks"}

DataDir: TypeAlias = Annotated[
    str | None,
    typer.Option("--data-dir", help=Settings.model_fields["data_dir"].description),
]
ConfigFile: TypeAlias = Annotated[
    str | None, typer.Option("--config", help="TOML file with any of the settings.")
]
AsJson: TypeAlias = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def settings_of(data_dir: str | None, config: str | None) -> Settings:
    """The settings a server with these options would have. Raises `SettingInvalid`."""
    return load_settings({"data_dir": data_dir, "config": config}, os.environ, warn=say)


@contextmanager
def administration(
    data_dir: str | None, config: str | None, *, creates: bool = False
) -> "Iterator[Administration]":
    """The store's administration until the block ends. Raises `StartError`, in one line.

    An SQLite store that is not there is made only where *creates*: beside the server's own it would be
    a second one, whose keys open nothing.
    """
    from trivec.accounts.stores import open_administration
    from trivec.core.clock import SystemClock

    settings = settings_of(data_dir, config)
    if not creates:
        check_store_is_there(settings)
    with (
        telling_what_is_away(settings),
        open_administration(settings, clock=SystemClock()) as books,
    ):
        yield books


def check_store_is_there(settings: Settings) -> None:
    """Raise `StoreRefused` where an SQLite store would have to be made."""
    from trivec.accounts.stores import sqlite_file

    file = sqlite_file(settings)
    if file is not None and not file.exists():
        raise StoreRefused(
            f"there is no store in {settings.data_dir}; name the server's own data folder with "
            "--data-dir, or start one with: trivec serve"
        )


@contextmanager
def telling_what_is_away(settings: Settings) -> Iterator[None]:
    """Turn a client's `StoreUnavailable` into the operator's line: which host, and why."""
    try:
        yield
    except StoreUnavailable as fault:
        url = settings.database_url
        address = None if url is None else urlsplit(url.get_secret_value())
        where = (
            settings.data_dir if address is None else f"{address.hostname}:{address.port or 5432}"
        )
        cause = " ".join(str(fault.__cause__ or fault).split())
        next_step = "is it running, and may this machine reach it?" if address else "try again"
        raise StoreRefused(f"the store at {where} cannot be used: {cause}; {next_step}") from fault


def say(line: str) -> None:
    """To people; standard output is for data."""
    print(line, file=sys.stderr)


def print_json(value: object) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def print_table(table: "Table", *, spare: Sequence[str] = ()) -> None:
    """As wide as the terminal, by folding text; a pipe gets whole rows and no colours.

    Where a terminal has no room for every number and a bit of every text, columns named in *spare*
    are left out, one after another.
    """
    from rich.console import Console

    width = columns_to_fill()
    if not sys.stdout.isatty():
        width = max(width, _width(table, text_max=None))
    for name in spare:
        if _width(table, text_max=FOLDED_MIN) > width:
            table = _without(table, name)
    Console(width=width).print(table)


def _without(table: "Table", name: str) -> "Table":
    kept = [column for column in table.columns if column.header != name]
    made = _empty(*(column.copy() for column in kept), footer=table.show_footer)
    for cells in zip(*(column.cells for column in kept), strict=True):
        made.add_row(*cells)
    return made


def _width(table: "Table", *, text_max: int | None) -> int:
    """How many columns of a terminal *table* takes, where texts are folded to *text_max* each."""
    from rich.cells import cell_len
    from rich.text import Text

    widths = []
    for column in table.columns:
        cells = [str(cell) for cell in (column.header, *column.cells, column.footer)]
        lines = [line for cell in cells for line in Text.from_markup(cell).plain.split("\n")]
        width = max(cell_len(line) for line in lines)
        widths.append(width if column.no_wrap or text_max is None else min(width, text_max))
    return sum(widths) + 3 * len(widths)


def columns_to_fill() -> int:
    """How wide a table may be."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else PIPED_COLUMNS


def table(columns: Iterable[str], *, numbers: Sequence[str] = (), footer: bool = False) -> "Table":
    """An empty table without frames; the columns named in *numbers* are aligned to the right."""
    made = _empty(footer=footer)
    for column in columns:
        of_number = column in numbers
        made.add_column(
            column,
            justify="right" if of_number else "left",
            no_wrap=of_number,
            overflow="fold",  # half a name may be another key's
            footer_style="bold",
        )
    return made


def _empty(*columns: "Column", footer: bool) -> "Table":
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    return Table(*columns, box=SIMPLE_HEAD, show_footer=footer, header_style="bold", pad_edge=False)


def instant(text: str | None, *, option: str, ahead: bool) -> int | None:
    """Microseconds since the epoch for a date, an instant, or a span such as 30d from now.

    *ahead* says whether a span lies in the future. Without a zone, UTC. Raises `SettingInvalid`.
    """
    from trivec.accounts.utc import microseconds

    if text is None:
        return None
    span = re.fullmatch(r"(\d{1,6})([mhdw])", text)
    try:
        if span is None:
            return microseconds(datetime.fromisoformat(text))
        length = timedelta(**{UNITS[span[2]]: int(span[1])})
        now = datetime.now(UTC)
        return microseconds(now + length if ahead else now - length)
    except (ValueError, OverflowError):
        raise SettingInvalid(
            f"{option} is {text!r}; give a date such as 2026-11-22, an instant such as "
            "2026-11-22T17:30Z, or a span such as 30d or 12h"
        ) from None


def styled(text: str, style: str = "none") -> str:
    """*text* as it is, brackets and all, in a style of rich's."""
    from rich.markup import escape

    return f"[{style}]{escape(text)}[/]"


def iso(time_us: int | None) -> str | None:
    """For JSON: whole seconds in UTC."""
    from trivec.accounts.utc import moment

    if time_us is None:
        return None
    return moment(time_us).replace(microsecond=0).isoformat().replace("+00:00", "Z")


def shown(time_us: int | None) -> str:
    """For people, in UTC; nothing where there is no instant."""
    from trivec.accounts.utc import moment

    return "" if time_us is None else f"{moment(time_us):%Y-%m-%d %H:%M}"


def counted(number: int | None) -> str:
    """With commas; nothing where there is no number."""
    return "" if number is None else f"{number:,}"


Json: TypeAlias = dict[str, Any]  # an object to be printed, by member
