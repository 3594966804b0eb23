"""Sums over the ledger, as SQL."""

from collections.abc import Iterable
from typing import Any

from sqlalchemy import ColumnElement, Row, Select, case, func, select

from trivec.accounts.page import SUCCESS_BELOW
from trivec.accounts.stores.schema import ledger
from trivec.accounts.types import UsageBy, UsageLine, UsageQuery
from trivec.accounts.utc import DAY_US, day_number


def usage_statement(query: UsageQuery) -> Select[Any]:
    group = _group(query.by)
    statement = select(
        group.label("grouped_by"),
        func.count().label("requests"),
        func.sum(case((ledger.c.status >= SUCCESS_BELOW, 1), else_=0)).label("failed"),
        func.sum(ledger.c.token_count).label("tokens"),
    ).group_by(group)
    if query.since_us is not None:
        statement = statement.where(ledger.c.time_us >= query.since_us)
    if query.until_us is not None:
        statement = statement.where(ledger.c.time_us < query.until_us)
    if query.key_id is not None:
        statement = statement.where(ledger.c.key_id == query.key_id)
    return statement


def usage_lines(found: Iterable[Row[Any]], by: UsageBy) -> list[UsageLine]:
    lines = [
        UsageLine(
            day_number(row.grouped_by) if by is UsageBy.DAY else row.grouped_by,
            None,
            requests=row.requests,
            failed=int(row.failed),
            tokens=int(row.tokens),  # Postgres sums to a decimal
        )
        for row in found
    ]
    return sorted(lines, key=lambda line: line.group or "")


def _group(by: UsageBy) -> ColumnElement[Any]:
    match by:
        case UsageBy.KEY:
            return ledger.c.key_id
        case UsageBy.MODEL:
            return ledger.c.model
        case UsageBy.DAY:
            return ledger.c.time_us // DAY_US
