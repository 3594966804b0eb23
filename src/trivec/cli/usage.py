"""`trivec usage`: what the ledger says, summed by key, model or day."""

import csv
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from trivec.cli.store import (
    AsJson,
    ConfigFile,
    DataDir,
    Json,
    administration,
    counted,
    instant,
    print_json,
    print_table,
    say,
    styled,
    table,
)
from trivec.core.errors import SettingInvalid

if TYPE_CHECKING:
    from trivec.accounts import UsageBy, UsageLine

NUMBERS = ("REQUESTS", "FAILED", "TOKENS", "SHARE")
SPARE = ("KEY", "SHARE", "FAILED", "REQUESTS")  # left out in a narrow terminal, the first one first


def usage(
    by: Annotated[str, typer.Option("--by", help="key, model or day.")] = "key",
    since: Annotated[
        str | None, typer.Option("--since", help="From this date, instant, or span such as 7d ago.")
    ] = None,
    until: Annotated[
        str | None, typer.Option("--until", help="Up to this date or instant, not included.")
    ] = None,
    key: Annotated[str | None, typer.Option("--key", help="Only this key, by name or id.")] = None,
    data_dir: DataDir = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV instead of a table.")] = False,
) -> None:
    """Sum the ledger: requests and the tokens they were billed."""
    from trivec.accounts import UsageQuery

    if as_json and as_csv:
        raise SettingInvalid("--json and --csv exclude each other; give one")
    grouping = _grouping(by)
    with administration(data_dir, config) as books:
        query = UsageQuery(
            grouping,
            since_us=instant(since, option="--since", ahead=False),
            until_us=instant(until, option="--until", ahead=False),
            key_id=None if key is None else books.key_id(key),
        )
        lines = books.usage(query)
    if as_json:
        print_json(_rows(lines, grouping))
    elif as_csv:
        _print_csv(lines, grouping)
    elif not lines:
        say("Nothing was used in that time.")
    else:
        _print_lines(lines, grouping)


def _rows(lines: "list[UsageLine]", by: "UsageBy") -> list[Json]:
    """`key` and `name`, or `model`, or `day`; `requests`, `failed`, `tokens`, and its `share` of these."""
    total = sum(line.tokens for line in lines)
    return [
        {
            by.value: line.group,
            **({"name": line.name} if by == "key" else {}),
            "requests": line.requests,
            "failed": line.failed,
            "tokens": line.tokens,
            "share": round(line.tokens / total, 6) if total else 0.0,
        }
        for line in lines
    ]


def _print_csv(lines: "list[UsageLine]", by: "UsageBy") -> None:
    names = ["name"] if by == "key" else []
    columns = [by.value, *names, "requests", "failed", "tokens", "share"]
    writer = csv.DictWriter(sys.stdout, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(_rows(lines, by))


def _print_lines(lines: "list[UsageLine]", by: "UsageBy") -> None:
    heads = {"key": ["NAME", "KEY"], "model": ["MODEL"], "day": ["DAY (UTC)"]}[by.value]
    rows = table([*heads, *NUMBERS], numbers=NUMBERS, footer=len(lines) > 1)
    total = sum(line.tokens for line in lines)
    for line in lines:
        group = styled(line.group or "none", "dim" if by == "key" or not line.group else "bold")
        names = [styled(line.name or "", "bold"), group] if by == "key" else [group]
        share = f"{line.tokens / total:.1%}" if total else ""
        numbers = [counted(line.requests), counted(line.failed), counted(line.tokens), share]
        rows.add_row(*names, *numbers)
    footers = [
        "total",
        *[""] * (len(heads) - 1),
        counted(sum(line.requests for line in lines)),
        counted(sum(line.failed for line in lines)),
        counted(total),
        "",
    ]
    for column, footer in zip(rows.columns, footers, strict=True):
        column.footer = footer
    print_table(rows, spare=SPARE)


def _grouping(by: str) -> "UsageBy":
    from trivec.accounts import UsageBy

    try:
        return UsageBy(by)
    except ValueError:
        raise SettingInvalid(f"--by is {by}; it is key, model or day") from None
