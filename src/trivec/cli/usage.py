"""`trivec usage`: sums over the ledger, by key, model or day."""

import csv
import sys
from typing import Annotated

import typer
from typer import Option

from trivec.accounts import UsageBy, UsageQuery
from trivec.cli.common import (
    AsJson,
    ConfigFile,
    DataDir,
    Row,
    administration,
    instant,
    print_json,
    print_table,
    say,
    settings_of,
    styled,
)
from trivec.core.errors import SettingInvalid

FOLDED = ("NAME", "KEY", "MODEL")
SPARE = ("KEY", "SHARE", "FAILED", "REQUESTS")  # left out in a narrow terminal, the first one first
HEADINGS = {UsageBy.KEY: "KEY", UsageBy.MODEL: "MODEL", UsageBy.DAY: "DAY (UTC)"}

app = typer.Typer(add_completion=False)


@app.command()
def usage(
    by: Annotated[UsageBy, Option(help="What is summed.")] = UsageBy.KEY,
    since: Annotated[str | None, Option(help="From this date, instant, or span as 7d ago.")] = None,
    until: Annotated[str | None, Option(help="Up to this date or instant, not included.")] = None,
    key: Annotated[str | None, Option(help="Only this key, by name or id.")] = None,
    data_dir: DataDir = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
    as_csv: Annotated[bool, Option("--csv", help="Print CSV instead of a table.")] = False,
) -> None:
    """Sum what was used, by key, model or day: requests and the tokens they were billed."""
    if as_json and as_csv:
        raise SettingInvalid("--json and --csv exclude each other; give one")
    since_us = None if since is None else instant(since, option="--since", ahead=False)
    until_us = None if until is None else instant(until, option="--until", ahead=False)
    with administration(settings_of(data_dir, config)) as books:
        key_id = None if key is None else books.key_id(key)
        query = UsageQuery(by, since_us=since_us, until_us=until_us, key_id=key_id)
        lines = books.usage(query)
    total = sum(line.tokens for line in lines)
    rows = [
        {
            by: line.group,
            **({"name": line.name} if by is UsageBy.KEY else {}),
            "requests": line.requests,
            "failed": line.failed,
            "tokens": line.tokens,
            "share": round(line.tokens / total, 6) if total else 0.0,
        }
        for line in lines
    ]
    if as_json:
        print_json(rows)
    elif as_csv:
        names = ["name"] if by is UsageBy.KEY else []
        columns = [by, *names, "requests", "failed", "tokens", "share"]
        writer = csv.DictWriter(sys.stdout, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    elif not lines:
        say("Nothing was used in that time.")
    else:
        cells: list[Row] = [
            {
                **({"NAME": styled(line.name or "", "bold")} if by is UsageBy.KEY else {}),
                HEADINGS[by]: styled(line.group or "none", "dim" if by is UsageBy.KEY else "bold"),
                "REQUESTS": line.requests,
                "FAILED": line.failed,
                "TOKENS": line.tokens,
                "SHARE": f"{line.tokens / total:6.1%}" if total else "",
            }
            for line in lines
        ]
        if len(lines) > 1:
            sums = {
                "REQUESTS": sum(line.requests for line in lines),
                "FAILED": sum(line.failed for line in lines),
                "TOKENS": total,
            }
            first = next(iter(cells[0]))
            cells.append({**dict.fromkeys(cells[0]), first: "[bold]total[/]", **sums})
        print_table(cells, folded=FOLDED, spare=SPARE)
