"""Parts that several commands share: options, access to the store, and what is printed."""

import json
import os
import re
import shutil
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, TypeAlias
from urllib.parse import urlsplit

import typer

from trivec.core.errors import SettingInvalid, StoreRefused, StoreUnavailable
from trivec.settings import Settings, load_settings

if TYPE_CHECKING:
    from trivec.accounts.administration import Administration

PIPED_COLUMNS = 10_000  # no terminal to fit into: rows stay whole
FOLDED_MIN = 12  # characters that a folded column must have left, or others go
UNITS = {"m": "minutes", "h": "hours", "d": "days", "w": "weeks"}

DataDir: TypeAlias = Annotated[
    str | None, typer.Option("--data-dir", help=Settings.model_fields["data_dir"].description)
]
ConfigFile: TypeAlias = Annotated[
    str | None, typer.Option("--config", help="TOML file with any of the settings.")
]
AsJson: TypeAlias = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


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

    An SQLite store is made only where *creates*: one beside the server's own would be a second store,
    whose keys open nothing.
    """
    from trivec.accounts.stores import sqlite_file

    file = sqlite_file(settings)
    if not creates and file is not None and not file.exists():
        raise StoreRefused(
            f"there is no store in {settings.data_dir}; name the server's own data folder with "
            "--data-dir, or start one with: trivec serve"
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


def say(line: str) -> None:
    """Print a line for people; standard output is for data."""
    print(line, file=sys.stderr)


def print_json(value: object) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def counted(number: int | None) -> str:
    """With commas; nothing where there is no number."""
    return "" if number is None else f"{number:,}"


def styled(text: str, style: str = "none") -> str:
    """*text* in a style of rich's, as it is: its brackets are no markup."""
    from rich.markup import escape

    return f"[{style}]{escape(text)}[/]"


def print_table(
    rows: Sequence[Mapping[str, str]],
    *,
    numbers: Collection[str] = (),
    whole: Collection[str] = (),
    spare: Sequence[str] = (),
    total: Mapping[str, str] | None = None,
) -> None:
    """Print *rows*, each from column to cell in rich's markup, as wide as the terminal.

    Text is folded, except in the columns *numbers*, which are aligned to the right, and *whole*. Where
    that is not enough the columns *spare* are left out, one after another. A pipe gets whole rows.
    """
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    texts = [*rows, total] if total else rows

    def width(column: str) -> int:
        cells = [column, *(Text.from_markup(row[column]).plain for row in texts)]
        longest = max(Text(line).cell_len for cell in cells for line in cell.split("\n"))
        return longest if column in numbers or column in whole else min(longest, FOLDED_MIN)

    columns = list(rows[0])
    console = Console(width=PIPED_COLUMNS)
    if sys.stdout.isatty():
        console = Console(width=shutil.get_terminal_size().columns)
        for name in spare:
            if name in columns and sum(width(one) + 3 for one in columns) > console.width:
                columns.remove(name)
    table = Table(
        box=SIMPLE_HEAD, show_footer=total is not None, header_style="bold", pad_edge=False
    )
    for column in columns:
        table.add_column(
            column,
            footer=(total or {}).get(column, ""),
            footer_style="bold",
            justify="right" if column in numbers else "left",
            no_wrap=column in numbers or column in whole,
            overflow="fold",  # half a name may be another key's
        )
    for row in rows:
        table.add_row(*(row[column] for column in columns))
    console.print(table)
