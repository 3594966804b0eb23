"""The log: one line a request, and one for each change in the process's life.

JSON for machines, readable on a terminal. A line holds ids, counts and durations. It is written by a
thread of its own: a stderr that is full, stuck or closed costs lines, never a request.
"""

import logging
import sys
import threading
from logging import LogRecord
from logging.handlers import QueueHandler, QueueListener
from queue import SimpleQueue
from typing import Any, Literal, TextIO

import msgspec
import structlog

from trivec.core.events import (
    BatchRan,
    Event,
    ModelLoaded,
    PhaseChanged,
    RequestServed,
    RowNotFinite,
)

LogFormat = Literal["auto", "json", "text"]

LINES_MAX = 10_000  # waiting to be written; some seconds of the busiest server
BYTES_MAX = 16 * 1024 * 1024  # of the lines that wait
PIECE_BYTES_MAX = 4096  # what Linux writes to a pipe in one go, whoever else writes to it
GATHER_S = 0.05  # while busy, lines wait this long for others: one write and one wake-up for many
FINISH_S_MAX = 1.0  # for the last lines to be written, before the process ends all the same
MESSAGE_CHARS_MAX = 160  # of an error, on a terminal

PROBES = frozenset({"/livez", "/readyz", "/health", "/metrics"})  # asked every few seconds for ever


class LogThread(QueueListener):
    """The thread that writes log lines, and the bounded queue before it.

    `put` never blocks. Lines that find no room, or a stream that takes none, are dropped and counted;
    when lines can be written again, one says how many. Lines go out in pieces of `PIECE_BYTES_MAX`:
    other processes on the same pipe cannot write into one, and a thread that a busy interpreter lets
    run 200 times a second writes ten times as many lines as it would one by one.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._records: SimpleQueue[LogRecord | None] = SimpleQueue()
        super().__init__(self._records)
        self._stream = stream
        self._accounting = threading.RLock()  # reentrant: a signal's handler may log
        self._waiting_bytes = 0
        self._piece: list[str] = []
        self._piece_bytes = 0
        self._dropped_said = 0
        self._finishing = threading.Event()
        self._finished = threading.Event()
        self.dropped = 0  # lines, since the start
        self.start()

    def put(self, record: LogRecord) -> None:
        """Hand over a record whose `msg` is a finished line."""
        size = sys.getsizeof(record.msg)
        with self._accounting:
            if self._finished.is_set():
                self.handle(record)
                self._write()
            elif self._records.qsize() < LINES_MAX and self._waiting_bytes + size <= BYTES_MAX:
                self._waiting_bytes += size
                self._records.put(record)
            else:
                self.dropped += 1

    def drop(self, count: int) -> None:
        with self._accounting:
            self.dropped += count

    def finish(self, within_s: float) -> None:
        """Write what waits, unless that takes longer; later lines are written by their callers."""
        self._finishing.set()
        self.enqueue_sentinel()
        self._finished.wait(within_s)

    def dequeue(self, block: bool) -> Any:
        """The next record, or None at the end. The lines gathered so far are written before a wait."""
        if self._records.empty():
            if self._write() and self.dropped > self._dropped_said:
                count = self.dropped - self._dropped_said
                self._dropped_said += count
                structlog.get_logger().warning("log_lines_dropped", count=count)
            self._finishing.wait(GATHER_S)
        record = self._records.get(block)
        if record is None:
            self._write()
            self._finished.set()
            return record
        with self._accounting:
            self._waiting_bytes -= sys.getsizeof(record.msg)
        return record

    def handle(self, record: LogRecord) -> None:
        line = f"{record.msg}\n"
        size = len(line.encode(errors="replace"))
        if self._piece_bytes + size > PIECE_BYTES_MAX:
            self._write()
        self._piece.append(line)
        self._piece_bytes += size

    def _write(self) -> bool:
        """Write the gathered lines; whether there were any and the stream took them."""
        lines, self._piece, self._piece_bytes = self._piece, [], 0
        if not lines:
            return False
        try:
            if self._stream is None:
                raise ValueError("standard error was closed when the process started")
            self._stream.write("".join(lines))
            self._stream.flush()
        except (OSError, ValueError):  # the reader has gone, the disk is full, or it was closed
            self.drop(len(lines))
            return False
        return True


class _Handover(QueueHandler):
    """The last step of a line, rendered, before the log thread: of structlog's and of other loggers'."""

    def __init__(self, thread: LogThread) -> None:
        super().__init__(thread.queue)
        self.thread = thread

    def msg(self, line: str) -> None:
        self.thread.put(logging.makeLogRecord({"msg": line}))

    debug = info = warning = error = critical = msg  # structlog calls the method of the level

    def enqueue(self, record: LogRecord) -> None:
        self.thread.put(record)

    def handleError(self, record: LogRecord) -> None:  # noqa: N802 - the library's name
        """Count a record that cannot be formatted; the library would write to stderr itself."""
        self.thread.drop(1)


def configure_log(
    log_format: LogFormat = "auto",
    *,
    stream: TextIO | None = None,
    level: str = "info",
    process: str | None = None,
) -> None:
    """Send every line of the process, other libraries' too, to *stream* in one form.

    Without *stream* it is stderr, by a `LogThread`. "auto" is JSON unless that is a terminal. Every line
    names *process*, where there are several. Called once, before other threads and after any fork.
    """
    foreign: logging.Handler
    if stream is not None:
        foreign = logging.StreamHandler(stream)
        factory: Any = structlog.WriteLoggerFactory(stream)
        is_terminal = stream.isatty()
    else:
        stderr: TextIO | None = sys.stderr  # None where the process began without one
        foreign = handover = _Handover(LogThread(stderr))
        factory = lambda *_names: handover  # noqa: E731
        is_terminal = stderr is not None and stderr.isatty()
    number = logging.getLevelNamesMapping()[level.upper()]
    common: list[Any] = [
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="time"),
    ]
    if process:
        common.append(lambda _logger, _method, line: {**line, "process": process})
    ending: list[Any] = [_Terminal(colors=is_terminal)]
    if log_format == "json" or (log_format == "auto" and not is_terminal):
        ending = [
            _without_message,
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(_to_json),
        ]
    structlog.configure(
        processors=[*common, *ending],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=factory,
        cache_logger_on_first_use=False,
    )
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
    """How many lines of this process's log were dropped."""
    return sum(thread.dropped for thread in _threads())


def finish_log(within_s: float = FINISH_S_MAX) -> None:
    """Write the lines that still wait. Called when all else has ended."""
    for thread in _threads():
        thread.finish(within_s)


def _threads() -> list[LogThread]:
    """The one that `configure_log` started, if any."""
    return [one.thread for one in logging.getLogger().handlers if isinstance(one, _Handover)]


class RequestLog:
    """An `Observer` that writes a line for each request, and for each event an operator acts on.

    Batches and queue depths are metrics, not lines; a probe that passes is one at debug only.
    Called from any thread.
    """

    def __init__(self) -> None:
        self._log = structlog.get_logger().bind()

    def observe(self, event: Event) -> None:
        match event:
            case RequestServed():
                is_routine = event.route in PROBES and event.status < 400
                log = self._log.debug if is_routine else self._log.info
                log("request", **request_fields(event), message=event.message)
            case BatchRan(failed=True) as batch:
                fields = {name: getattr(batch, name) for name in batch.__slots__}
                self._log.warning("batch_failed", **fields)
            case RowNotFinite():
                self._log.warning("row_not_finite", model=event.model, recovered=event.recovered)
            case ModelLoaded(card=card):
                self._log.info(
                    "model_loaded",
                    model=card.id,
                    precision=card.precision,
                    verified=card.verified,
                    load_ms=round(event.load_s * 1e3),
                    cosine_min=event.cosine_min,
                    cosine_mean=event.cosine_mean,
                    **card.notes,
                )
            case PhaseChanged():
                self._log.info("phase", phase=event.phase, reason=event.reason)
            case _:
                pass


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


def _without_message(_logger: object, _method: str, line: Any) -> Any:
    """Drop a refusal's message: it may repeat a client's word, and a file keeps what it is given."""
    line.pop("message", None)
    return line


class _Terminal:
    """Renderer for a person: a request is one short line, its status and duration first."""

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
        if self._colors:
            color = "\x1b[31m" if status >= 500 else "\x1b[33m" if status >= 400 else "\x1b[32m"
            shown = f"{color}{shown[:3]}\x1b[0m{shown[3:]}"
        return f"{line['time'][11:19]} {shown}  {line['request_id']}"


def _to_json(line: object, **_unused: object) -> str:
    """JSON of one line. structlog passes json.dumps's keywords; msgspec needs none and is several times faster."""
    return msgspec.json.encode(line, enc_hook=repr).decode()
