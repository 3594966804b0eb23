"""Sums over the books, as SQL: whole days from their totals, the rest from ledger and counts."""

from collections.abc import Iterable
from typing import Any

from sqlalchemy import Column, ColumnElement, Row, Select, Table, case, func, literal_column, select

from trivec.accounts.allowance import MINUTE_US
from trivec.accounts.page import SUCCESS_BELOW, Total
from trivec.accounts.stores.schema import counts, daily, ledger
from trivec.accounts.types import UsageBy, UsageLine, UsageQuery
from trivec.accounts.utc import DAY_US, day, day_number, moment
from trivec.core.errors import FieldInvalid

MINUTES_A_DAY = DAY_US // MINUTE_US
Sums = Select[tuple[Any, ...]]


def usage_statements(query: UsageQuery) -> list[Sums]:
    """Their sums together are what was asked for."""
    first, end = _whole_days(query)
    statements = []
    if first is None or end is None or first <= end:
        statements = [_within(_of_days(query), daily.c.day, first, end)]
    for since_us, until_us in _parts(query):
        statements += _of_part(query, since_us, until_us)
    return statements


def check_not_archived(query: UsageQuery, *, before_us: int) -> None:
    """Raise `FieldInvalid` where a part of a day is asked for whose rows are not all here any more.

    *before_us* is the mark: rows before it are archived, and only their days' totals are left.
    """
    for since_us, until_us in _parts(query):
        if since_us < min(until_us, before_us):
            is_since = since_us == query.since_us
            raise FieldInvalid(
                f"Usage before {moment(before_us):%Y-%m-%d %H:%M} UTC is known for whole UTC days "
                f"only: its rows are archived. Give {'since' if is_since else 'until'} as a date, "
                f"such as {day(since_us)}.",
                param="since" if is_since else "until",
            )


def usage_lines(found: Iterable[Row[Any]], by: UsageBy) -> list[UsageLine]:
    totals: dict[str | None, Total] = {}
    for row in found:
        group = day_number(row.grouped_by) if by is UsageBy.DAY else row.grouped_by or None
        total = totals.setdefault(group, Total())
        total.requests += int(row.requests)  # Postgres sums to a decimal
        total.failed += int(row.failed)
        total.tokens += int(row.tokens)
    return [
        UsageLine(group, None, total.requests, total.failed, total.tokens)
        for group, total in sorted(totals.items(), key=lambda item: item[0] or "")
    ]


def _whole_days(query: UsageQuery) -> tuple[int | None, int | None]:
    """The first one asked for and the one after the last, since the epoch; None: no bound."""
    since_us, until_us = query.since_us, query.until_us
    first = None if since_us is None else -(-since_us // DAY_US)
    return first, None if until_us is None else until_us // DAY_US


def _parts(query: UsageQuery) -> list[tuple[int, int]]:
    """What is asked for beside whole days: from when to when, each within a day."""
    since_us, until_us = query.since_us, query.until_us
    first, end = _whole_days(query)
    parts = []
    if since_us is not None and first is not None and since_us != first * DAY_US:
        parts.append((since_us, first * DAY_US))
    if until_us is not None and end is not None:
        if first is not None and since_us is not None and first > end:  # both within a day
            return [(since_us, until_us)]
        if until_us != end * DAY_US:
            parts.append((end * DAY_US, until_us))
    return parts


def _of_days(query: UsageQuery) -> Sums:
    sums = (func.sum(daily.c.requests), func.sum(daily.c.failed), func.sum(daily.c.tokens))
    return _summed(query, daily, daily.c.day, sums)


def _of_part(query: UsageQuery, since_us: int, until_us: int) -> list[Sums]:
    """Of a part of a day. A count is in it when its minute begins in it."""
    rows = _summed(
        query,
        ledger,
        ledger.c.time_us // DAY_US,
        (
            func.count(),
            func.sum(case((ledger.c.status >= SUCCESS_BELOW, 1), else_=0)),
            func.sum(ledger.c.token_count),
        ),
    )
    counted = _summed(
        query,
        counts,
        counts.c.minute // MINUTES_A_DAY,
        (
            func.sum(counts.c.requests),
            func.sum(case((counts.c.status >= SUCCESS_BELOW, counts.c.requests), else_=0)),
            literal_column("0"),
        ),
    )
    first, end = -(-since_us // MINUTE_US), -(-until_us // MINUTE_US)
    return [
        _within(rows, ledger.c.time_us, since_us, until_us),
        _within(counted, counts.c.minute, first, end),
    ]


def _summed(
    query: UsageQuery,
    table: Table,
    its_day: ColumnElement[Any],
    sums: tuple[ColumnElement[Any], ColumnElement[Any], ColumnElement[Any]],
) -> Sums:
    match query.by:
        case UsageBy.KEY:
            group: ColumnElement[Any] = table.c.key_id
        case UsageBy.MODEL:
            group = table.c.model
        case UsageBy.DAY:
            group = its_day
    requests, failed, tokens = sums
    statement = select(
        group.label("grouped_by"),
        requests.label("requests"),
        failed.label("failed"),
        tokens.label("tokens"),
    ).group_by(group)
    if query.key_id is not None:
        statement = statement.where(table.c.key_id == query.key_id)
    return statement


def _within(statement: Sums, column: Column[Any], first: int | None, end: int | None) -> Sums:
    if first is not None:
        statement = statement.where(column >= first)
    return statement if end is None else statement.where(column < end)
