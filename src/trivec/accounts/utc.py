"""Instants as they are written down: integers of microseconds since the epoch, shown in UTC."""

from datetime import UTC, date, datetime, timedelta

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
MICROSECOND = timedelta(microseconds=1)
DAY_US = 24 * 3600 * 1_000_000
LAST = datetime.max.replace(tzinfo=UTC)


def moment(time_us: int) -> datetime:
    """The instant as a datetime in UTC, exactly."""
    return EPOCH + time_us * MICROSECOND


def microseconds(instant: datetime) -> int:
    """Exact; an instant without a zone is taken to be in UTC.

    Raises `ValueError` for one that has left the years 1970 to 9999 on its way to UTC, for nothing
    could show it again.
    """
    aware = instant if instant.tzinfo is not None else instant.replace(tzinfo=UTC)
    if not EPOCH <= aware <= LAST:
        raise ValueError("not between the years 1970 and 9999")
    return (aware - EPOCH) // MICROSECOND


def day(time_us: int) -> str:
    """The UTC day, as 2026-11-22."""
    return day_number(time_us // DAY_US)


def day_number(days: int) -> str:
    """The day that is *days* after the epoch's."""
    return (date(1970, 1, 1) + timedelta(days=days)).isoformat()
