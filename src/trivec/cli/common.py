"""What several commands share: options, settings, instants, and how things are printed."""

import json
import os
import re
import shutil
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime, timedelta
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, TypeAlias

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text
from typer import Option

from trivec.core.errors import SettingInvalid
from trivec.settings import Settings, load_settings

if TYPE_CHECKING:
    from trivec.core.ports import OnProgress

PIPED_COLUMNS = 10_000  # no terminal to fit into: rows stay whole
LINE_EVERY_S = 10.0  # of progress, where there is no terminal
FOLDED_MIN = 12  # characters that a folded column must have left, or others go
UNITS = {"m": "minutes", "h": "hours", "d": "days", "w": "weeks"}

DataDir: TypeAlias = Annotated[
    str | None, Option(help=Settings.model_fields["data_dir"].description)
]
ConfigFile: TypeAlias = Annotated[
    str | None, Option("--config", help="TOML file with any of the settings.")
]
AsJson: TypeAlias = Annotated[bool, Option("--json", help="Print JSON instead of a table.")]

Cell: TypeAlias = str | Text | float | None
Row: TypeAlias = dict[str, Cell]  # by column


def settings_of(data_dir: str | None, config: str | None = None, **flags: object) -> Settings:
    """The settings a server with these options would have. Raises `SettingInvalid`."""
    return load_settings({"data_dir": data_dir, "config": config, **flags}, os.environ, warn=say)


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


class LineConsole(Console):
    """Standard error, with its cursor never hidden: a killed process could not show it again."""

    def __init__(self) -> None:
        super().__init__(stderr=True)

    def show_cursor(self, show: bool = True) -> bool:
        return False


@contextmanager
def shown_progress(*, first_line_s: float = LINE_EVERY_S) -> "Iterator[OnProgress]":
    """Progress on standard error: a bar on a terminal, elsewhere a line now and then.

    *first_line_s*: how long before the first line, so that quick work prints none; infinite: never.
    """
    is_terminal = sys.stderr.isatty()
    bar = Progress(
        BarColumn(bar_width=20),  # the words are worth more, in 80 columns
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}", markup=False),
        console=LineConsole(),
        transient=True,
    )
    bar.add_task("", total=None)
    [task] = bar.tasks
    next_line_s = time.monotonic() + first_line_s

    def show(step: str, share: float | None) -> None:
        nonlocal next_line_s
        if is_terminal:
            is_new = step != task.description  # and may be over before the next refresh
            task.total = None if share is None else 1.0  # None, to `update`, is as it was
            bar.update(task.id, description=step, completed=share or 0.0, refresh=is_new)
            task.finished_time = None  # the clock goes on: another step may follow
        elif time.monotonic() >= next_line_s:
            say(step)
            next_line_s = time.monotonic() + LINE_EVERY_S

    with bar if is_terminal else nullcontext():
        yield show


def print_json(value: object) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def print_table(
    rows: Sequence[Row],
    *,
    styles: Mapping[str, str] = MappingProxyType({}),
    folded: Collection[str] = (),
    spare: Sequence[str] = (),
) -> None:
    """Print *rows*, all of the same columns, some of them in *styles* of rich's.

    No wider than the terminal: text in the columns *folded* may take several lines, and where that
    is not enough the columns *spare* are left out, one after another. A pipe gets whole rows.
    """

    def shown(cell: Cell) -> str | Text:
        if isinstance(cell, int | float):
            return f"{cell:,}" if isinstance(cell, int) else f"{cell:,.4g}"
        return cell or ""

    def width(column: str) -> int:
        lines = "\n".join([column, *map(str, columns[column])]).split("\n")
        longest = max(map(cell_len, lines))
        return min(longest, FOLDED_MIN) if column in folded else longest

    columns = {name: [shown(row[name]) for row in rows] for name in rows[0]}
    is_terminal = sys.stdout.isatty()
    console = Console(width=shutil.get_terminal_size().columns if is_terminal else PIPED_COLUMNS)
    for name in spare:
        if sum(width(one) + 3 for one in columns) > console.width:
            columns.pop(name, None)
    table = Table(box=SIMPLE_HEAD, header_style="bold", pad_edge=False)
    for name in columns:
        table.add_column(
            name,
            style=styles.get(name),
            justify="right" if any(isinstance(row[name], int | float) for row in rows) else "left",
            no_wrap=name not in folded,
            overflow="fold",  # half a name may be another key's
        )
    for cells in zip(*columns.values(), strict=True):
        table.add_row(*(one if isinstance(one, Text) else Text(one) for one in cells))
    console.print(table)
