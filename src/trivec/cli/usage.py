"""`trivec usage`: sums over the ledger, by key, model or day."""

import csv
import sys
from typing import Annotated, Literal

from typer import Option

from trivec.cli.common import (
    AsJson,
    ConfigFile,
    DataDir,
    administration,
    counted,
    instant,
    print_json,
    print_table,
    say,
    settings_of,
    styled,
)
from trivec.core.errors import SettingInvalid

NUMBERS = ("REQUESTS", "FAILED", "TOKENS", "SHARE")
SPARE = ("KEY", "SHARE", "FAILED", "REQUESTS")  # left out in a narrow terminal, the first one first
HEADINGS = {"key": "KEY", "model": "MODEL", "day": "DAY (UTC)"}


def usage(
    by: Annotated[Literal["key", "model", "day"], Option(help="What is summed.")] = "key",
    since: Annotated[str | None, Option(help="From this date, instant, or span as 7d ago.")] = None,
    until: Annotated[str | None, Option(help="Up to this date or instant, not included.")] = None,
    key: Annotated[str | None, Option(help="Only this key, by name or id.")] = None,
    data_dir: DataDir = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
    as_csv: Annotated[bool, Option("--csv", help="Print CSV instead of a table.")] = False,
) -> None:
    """Sum what was used, by key, model or day: requests and the tokens they were billed."""
    from trivec.accounts import UsageBy, UsageQuery

    if as_json and as_csv:
        raise SettingInvalid("--json and --csv exclude each other; give one")
    since_us = instant(since, option="--since", ahead=False)
    until_us = instant(until, option="--until", ahead=False)
    with administration(settings_of(data_dir, config)) as books:
        key_id = None if key is None else books.key_id(key)
        lines = books.usage(
            UsageQuery(UsageBy(by), since_us=since_us, until_us=until_us, key_id=key_id)
        )
    total = sum(line.tokens for line in lines)
    rows = [
        {
            by: line.group,
            **({"name": line.name} if by == "key" else {}),
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
        columns = [by, "name", "requests", "failed", "tokens", "share"]
        if by != "key":
            columns.remove("name")
        writer = csv.DictWriter(sys.stdout, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    elif not lines:
        say("Nothing was used in that time.")
    else:
        cells = [
            {
                **({"NAME": styled(line.name or "", "bold")} if by == "key" else {}),
                HEADINGS[by]: styled(line.group or "none", "dim" if by == "key" else "bold"),
                "REQUESTS": counted(line.requests),
                "FAILED": counted(line.failed),
                "TOKENS": counted(line.tokens),
                "SHARE": f"{line.tokens / total:.1%}" if total else "",
            }
            for line in lines
        ]
        sums = {
            **dict.fromkeys(cells[0], ""),
            next(iter(cells[0])): "total",
            "REQUESTS": counted(sum(line.requests for line in lines)),
            "FAILED": counted(sum(line.failed for line in lines)),
            "TOKENS": counted(total),
        }
        print_table(cells, numbers=NUMBERS, spare=SPARE, total=sums if len(lines) > 1 else None)
