"""One observer that tells many. It does not know what they do with an event."""

import structlog

from trivec.core.events import Event
from trivec.core.ports import Observer


class Observers:
    """Passes each event to every observer, in order; one that fails spoils nothing for the rest.

    A failure is logged the first time it happens in an observer, so that a broken one cannot flood
    the log from inside every request. Called from any thread.
    """

    def __init__(self, *many: Observer) -> None:
        self._many = many
        self._broken: set[int] = set()  # indices; a race costs at most a second line

    def observe(self, event: Event) -> None:
        for index, observer in enumerate(self._many):
            try:
                observer.observe(event)
            except Exception:
                if index not in self._broken:
                    self._broken.add(index)
                    structlog.get_logger("trivec.telemetry").exception(
                        "observer_failed", observer=type(observer).__name__
                    )
