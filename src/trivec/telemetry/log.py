"""The log: one line a request, and one for each turn in the process's life.

JSON for machines, readable on a terminal. A line holds ids, counts and durations; text, vectors and
keys are in no event, so they cannot be here. It does not know who collects the lines.
"""

import logging
import sys
from collections.abc import Mapping
from typing import Any, Literal, TextIO, cast

import msgspec
import structlog

from trivec.core.events import (
    BatchRan,
    Event,
    ModelLoaded,
    PhaseChanged,
    QueueChanged,
    RequestServed,
    RowNotFinite,
)
from trivec.telemetry.outlet import Outlet

LogFormat = Literal["auto", "json", "text"]

MESSAGE_CHARS_MAX = 160  # of an error, on a terminal
FINISH_S_MAX = 1.0  # for the last lines to be taken, before leaving all the same

PROBES = frozenset({"/livez", "/readyz", "/health", "/metrics"})  # asked every few seconds for ever


def configure_log(
    log_format: LogFormat = "auto",
    *,
    stream: TextIO | None = None,
    level: str = "info",
    process: str | None = None,
) -> None:
    """Send every line of the process, other libraries' too, to *stream* in one form.

    Without *stream* it is stderr, through an `Outlet`: a reader that is stuck holds nobody up.
    "auto" is JSON unless it is a terminal. Every line names *process*, where there are several.
    Called once, by the entrance, before any thread.
    """
    out = stream if stream is not None else Outlet(sys.stderr, told=_tell_of_dropped)
    as_json = log_format == "json" or (log_format == "auto" and not out.isatty())
    number = logging.getLevelNamesMapping()[level.upper()]
    common: list[Any] = [
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="time"),
        *([_naming(process)] if process else []),
    ]
    ending: list[Any] = (
        [
            _without_message,
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(_to_json),
        ]
        if as_json
        else [_Terminal(colors=out.isatty())]
    )
    structlog.configure(
        processors=[*common, *ending],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.WriteLoggerFactory(cast(TextIO, out)),
        cache_logger_on_first_use=False,
    )
    foreign = logging.StreamHandler(out)
    foreign.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*common, structlog.stdlib.add_logger_name],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *ending],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [foreign]
    root.setLevel(max(number, logging.WARNING))  # libraries talk when something is wrong


def lines_dropped() -> int:
    """How many lines of this process's log nobody took."""
    return sum(outlet.dropped for outlet in _outlets())


def finish_log(within_s: float = FINISH_S_MAX) -> None:
    """Write the lines that still wait. Called by the entrance, when all else has ended."""
    for outlet in _outlets():
        outlet.close(within_s)


def _outlets() -> list[Outlet]:
    """The one that `configure_log` installed, if any: the standard library keeps it for us."""
    streams = [getattr(handler, "stream", None) for handler in logging.getLogger().handlers]
    return [stream for stream in streams if isinstance(stream, Outlet)]


def _tell_of_dropped(count: int) -> None:
    structlog.get_logger().warning("log_lines_dropped", count=count)


class RequestLog:
    """An `Observer` that writes a line for each request, and for each event an operator acts on.

    Batches and line depths are metrics, not lines; a probe that passes is one at debug only.
    Called from any thread.
    """

    def __init__(self) -> None:
        self._log = structlog.get_logger().bind()

    def observe(self, event: Event) -> None:
        match event:
            case RequestServed():
                is_routine = event.route in PROBES and event.status < 400
                tell = self._log.debug if is_routine else self._log.info
                tell("request", **request_fields(event), message=event.message)
            case BatchRan(failed=True):
                self._log.warning("batch_failed", **_fields(event))
            case BatchRan() | QueueChanged():
                pass
            case RowNotFinite():
                self._log.warning("row_not_finite", **_fields(event))
            case ModelLoaded():
                self._log.info("model_loaded", **model_fields(event))
            case PhaseChanged():
                self._log.info("phase", phase=event.phase, reason=event.reason)


def request_fields(event: RequestServed) -> dict[str, object]:
    """What a request's line says: milliseconds to the microsecond, and nothing that is absent."""
    fields: dict[str, object] = {
        "request_id": event.request_id,
        "method": event.method,
        "route": event.route,
        "status": event.status,
        "duration_ms": round(event.duration_s * 1e3, 3),
        "request_bytes": event.request_bytes,
        "answer_bytes": event.answer_bytes,
    }
    if event.code is not None:
        fields["code"] = event.code
    if event.key_id is not None:
        fields["key_id"] = event.key_id
    if event.client_request_id is not None:
        fields["client_request_id"] = event.client_request_id
    if event.model is not None:
        fields["model"] = event.model
        fields["inputs"] = event.input_count
        fields["tokens"] = event.token_count
        fields["tokenize_ms"] = round(event.tokenize_s * 1e3, 3)
        fields["queue_ms"] = round(event.queue_s * 1e3, 3)
        fields["compute_ms"] = round(event.compute_s * 1e3, 3)
        fields["encode_ms"] = round(event.encode_s * 1e3, 3)
    return fields


def model_fields(event: ModelLoaded) -> dict[str, object]:
    """What is known of a model when it starts to serve: the certificate's figures among it."""
    card = event.card
    return {
        "model": card.id,
        "precision": card.precision,
        "verified": card.verified,
        "load_ms": round(event.load_s * 1e3),
        "cosine_min": event.cosine_min,
        "cosine_mean": event.cosine_mean,
        **dict(card.notes),
    }


def _fields(event: BatchRan | RowNotFinite) -> Mapping[str, object]:
    return {name: getattr(event, name) for name in event.__slots__}


def _naming(process: str) -> Any:
    def name(_logger: object, _method: str, line: dict[str, Any]) -> dict[str, Any]:
        return {**line, "process": process}

    return name


def _without_message(_logger: object, _method: str, line: Any) -> Any:
    """A client's own words in it are for whoever sits before the server, and for no file."""
    line.pop("message", None)
    return line


class _Terminal:
    """Renders lines for a person; a request's is one short line, its status and duration first."""

    def __init__(self, *, colors: bool) -> None:
        self._colors = colors
        self._other = structlog.dev.ConsoleRenderer(colors=colors, timestamp_key="time")

    def __call__(self, logger: Any, method: str, line: Any) -> str:
        if line.get("event") != "request":
            return self._other(logger, method, line)
        status = int(line["status"])
        shown = f"{status} {line['duration_ms']:9.1f} ms  {line['method']} {line['route']}"
        if "model" in line:
            shown += f"  {line['model']}  {line['inputs']} inputs  {line['tokens']} tokens"
        if why := line.get("message") or line.get("code"):
            # A message may repeat a client's own word: nothing in it may move the cursor.
            shown += "  " + "".join(c if c.isprintable() else " " for c in why)[:MESSAGE_CHARS_MAX]
        color = "\x1b[31m" if status >= 500 else "\x1b[33m" if status >= 400 else "\x1b[32m"
        dyed = f"{color}{shown[:3]}\x1b[0m{shown[3:]}" if self._colors else shown
        return f"{line['time'][11:19]} {dyed}  {line['request_id']}"


def _to_json(line: object, **_unused: object) -> str:
    """JSON of one line. The caller passes json.dumps's keywords; msgspec needs none and is several times faster."""
    return msgspec.json.encode(line, enc_hook=repr).decode()
