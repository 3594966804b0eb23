"""Instants as they are written down: integers of microseconds since the epoch, shown in UTC."""

from datetime import UTC, date, datetime, timedelta

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
MICROSECOND = timedelta(microseconds=1)
DAY_US = 24 * 3600 * 1_000_000


def moment(time_us: int) -> datetime:
    """The instant as a datetime in UTC, exactly."""
    return EPOCH + time_us * MICROSECOND


def microseconds(instant: datetime) -> int:
    """Exact; an instant without a zone is taken to be in UTC."""
    aware = instant if instant.tzinfo is not None else instant.replace(tzinfo=UTC)
    return (aware - EPOCH) // MICROSECOND


def day(time_us: int) -> str:
    """The UTC day, as 2026-11-22."""
    return day_number(time_us // DAY_US)


def day_number(days: int) -> str:
    """The day that is *days* after the epoch's."""
    return (date(1970, 1, 1) + timedelta(days=days)).isoformat()
