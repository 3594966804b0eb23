"""Around the whole life of a process: how its log looks, and what its end is called."""

import logging
from collections.abc import Callable

from trivec.core.errors import StartError
from trivec.server.processes import INTERRUPTED
from trivec.server.supervisor import START_REFUSED
from trivec.settings import Settings

FAILED = 1


def whole_life(
    settings: Settings,
    life: Callable[[], int],
    *,
    say: Callable[[str], None],
    process: str | None = None,
) -> int:
    """The exit code of *life*. Nothing raised in it may reach the parent's code.

    *process* is its name among several, for the log.
    """
    try:
        from trivec.telemetry import configure_log

        configure_log(settings.telemetry.log_format, level=settings.log_level, process=process)
        return life()
    except StartError as refusal:
        say(f"trivec: {refusal}")
        return START_REFUSED
    except KeyboardInterrupt:  # before it had a handler; nothing was accepted yet
        return INTERRUPTED
    except BaseException:  # the outermost loop of the process; a library's panic is no Exception
        logging.getLogger("trivec").exception("the server process failed")
        return FAILED
    finally:
        from trivec.telemetry import finish_log

        finish_log()
