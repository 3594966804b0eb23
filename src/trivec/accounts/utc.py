"""Instants as integers of microseconds since the epoch, and their form in UTC."""

from datetime import UTC, date, datetime, timedelta

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
MICROSECOND = timedelta(microseconds=1)
SECOND_US = 1_000_000
MINUTE_US = 60 * SECOND_US
DAY_US = 24 * 60 * MINUTE_US
LAST = datetime.max.replace(tzinfo=UTC)


def moment(time_us: int) -> datetime:
    """The instant as a datetime in UTC, exactly."""
    return EPOCH + time_us * MICROSECOND


def microseconds(instant: datetime) -> int:
    """Exact; an instant without a zone is taken to be in UTC.

    Raises `ValueError` outside the years 1970 to 9999 in UTC, which could not be shown again.
    """
    aware = instant if instant.tzinfo is not None else instant.replace(tzinfo=UTC)
    if not EPOCH <= aware <= LAST:
        raise ValueError("not between the years 1970 and 9999")
    return (aware - EPOCH) // MICROSECOND


def day(days: int) -> str:
    """The UTC day that is *days* after the epoch's, as 2026-11-22."""
    return (date(1970, 1, 1) + timedelta(days=days)).isoformat()
