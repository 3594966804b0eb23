"""Sums over the books, as SQL: whole days from their totals, the rest from ledger and counts."""

from collections.abc import Iterable
from typing import Any

from sqlalchemy import Column, ColumnElement, Row, Select, Table, case, func, literal_column, select

from trivec.accounts.allowance import MINUTE_US
from trivec.accounts.page import SUCCESS_BELOW, Total
from trivec.accounts.stores.schema import counts, daily, ledger
from trivec.accounts.types import UsageBy, UsageLine, UsageQuery
from trivec.accounts.utc import DAY_US, day_number

MINUTES_A_DAY = DAY_US // MINUTE_US
Sums = Select[tuple[Any, ...]]


def usage_statements(query: UsageQuery) -> list[Sums]:
    """Their sums together are what was asked for."""
    since_us, until_us = query.since_us, query.until_us
    first = None if since_us is None else -(-since_us // DAY_US)  # whole days: first to end
    end = None if until_us is None else until_us // DAY_US
    if first is not None and end is not None and first > end:
        return _of_part(query, since_us, until_us)  # within a day
    statements = [_within(_of_days(query), daily.c.day, first, end)]
    if first is not None and since_us != first * DAY_US:
        statements += _of_part(query, since_us, first * DAY_US)
    if end is not None and until_us != end * DAY_US:
        statements += _of_part(query, end * DAY_US, until_us)
    return statements


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


def _of_days(query: UsageQuery) -> Sums:
    sums = (func.sum(daily.c.requests), func.sum(daily.c.failed), func.sum(daily.c.tokens))
    return _summed(query, daily, daily.c.day, sums)


def _of_part(query: UsageQuery, since_us: int | None, until_us: int | None) -> list[Sums]:
    """Of a part of a day. A count is in it when its minute begins in it."""
    assert since_us is not None
    assert until_us is not None
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
    day: ColumnElement[Any],
    sums: tuple[ColumnElement[Any], ColumnElement[Any], ColumnElement[Any]],
) -> Sums:
    match query.by:
        case UsageBy.KEY:
            group: ColumnElement[Any] = table.c.key_id
        case UsageBy.MODEL:
            group = table.c.model
        case UsageBy.DAY:
            group = day
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
