"""The log: one line a request, and one for each change in the process's life.

JSON for machines, readable on a terminal. A line holds ids, counts and durations. A thread of its
own writes it, so that a stderr that is full, stuck or closed costs lines and delays no request.
"""

import logging
import sys
import threading
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from queue import SimpleQueue
from typing import Any, Literal, TextIO

import msgspec
import structlog

from trivec.core import events
from trivec.core.events import Event

LogFormat = Literal["auto", "json", "text"]

WAITING_BYTES_MAX = 8 * 1024 * 1024  # of lines not yet written: some 15,000 requests
PIECE_BYTES_MAX = 4096  # what Linux writes to a pipe without mixing it with other processes' lines
GATHER_S = 0.05  # a line waits this long for others: many lines, one write and one wake-up
FINISH_S_MAX = 1.0  # for the last lines to be written, before the process ends all the same
MESSAGE_CHARS_MAX = 160  # of an error, on a terminal
ERASE_LINE = "\r\x1b[K"

PROBES = frozenset({"/livez", "/readyz", "/health", "/metrics"})  # polled every few seconds


class LogHandler(logging.Handler):
    """Handler that writes lines on a thread of its own, behind a queue bounded in bytes.

    `put` never blocks. Lines beyond the bound, or refused by the stream, are dropped and counted; a
    line says how many as soon as one can be written again. Not `logging.handlers.QueueListener`: it
    bounds no bytes, its end has no time limit, and it writes line by line, a tenth of the lines a
    second where a busy interpreter lets a thread run 200 times a second.
    """

    def __init__(self, stream: TextIO | None) -> None:
        super().__init__()
        self.dropped = 0  # lines since the start
        self._stream = stream
        self._queue = SimpleQueue[str | None]()  # its `put` is reentrant; None: the end
        self._waiting_bytes = 0
        self._numbers = threading.RLock()  # guards them; reentrant, since a signal handler may log
        self._finishing = threading.Event()
        self._is_finished = False
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()

    def put(self, line: str) -> None:
        """Hand over a line without its newline. Called from any thread."""
        size = sys.getsizeof(line)
        with self._numbers:
            if self._waiting_bytes + size > WAITING_BYTES_MAX:
                self.dropped += 1
                return
            self._waiting_bytes += size
            if not self._is_finished:
                self._queue.put(line)
                return
        self._write([line])

    debug = info = warning = error = critical = put  # structlog calls the method of the level

    def emit(self, record: logging.LogRecord) -> None:
        """A line of another library, by way of the standard library's loggers."""
        try:
            self.put(self.format(record))
        except Exception:  # their mistakes; logging's own answer writes to stderr itself
            self._drop(1)

    def finish(self, within_s: float) -> None:
        """Write what waits, unless that takes longer; later lines are written by their callers."""
        self._finishing.set()
        self._queue.put(None)
        self._thread.join(within_s)

    def _run(self) -> None:
        reported = 0
        is_last = False
        while not is_last:
            first = self._queue.get()
            self._finishing.wait(GATHER_S)
            lines = [first, *self._drain()]
            is_last = None in lines
            if self._write(line for line in lines if line is not None) and self.dropped > reported:
                count, reported = self.dropped - reported, self.dropped
                structlog.get_logger().warning("log_lines_dropped", count=count)
        with self._numbers:
            self._is_finished = True
        self._write(line for line in self._drain() if line is not None)

    def _drain(self) -> Iterator[str | None]:
        while not self._queue.empty():  # only this thread takes lines out
            yield self._queue.get()

    def _drop(self, count: int) -> None:
        with self._numbers:
            self.dropped += count

    def _write(self, lines: Iterable[str]) -> bool:
        """Write *lines* in pieces; whether the stream took the last of them."""
        is_taken = False
        for piece in pieces(lines):
            try:
                if self._stream is None:
                    raise ValueError("standard error was closed when the process started")
                self._stream.write("".join(f"{line}\n" for line in piece))
                self._stream.flush()
                is_taken = True
            except (OSError, ValueError):  # the reader has gone, the disk is full, or it was closed
                self._drop(len(piece))
                is_taken = False
            with self._numbers:
                self._waiting_bytes -= sum(map(sys.getsizeof, piece))
        return is_taken


def pieces(lines: Iterable[str]) -> Iterator[list[str]]:
    """*lines* in groups of at most `PIECE_BYTES_MAX`; a longer line is a group of its own."""
    piece: list[str] = []
    piece_bytes = 0
    for line in lines:
        line_bytes = len(line.encode(errors="replace")) + 1
        if piece and piece_bytes + line_bytes > PIECE_BYTES_MAX:
            yield piece
            piece, piece_bytes = [], 0
        piece.append(line)
        piece_bytes += line_bytes
    if piece:
        yield piece


def configure_log(
    log_format: LogFormat = "auto", *, level: str = "info", process: str | None = None
) -> None:
    """Send every line of the process, other libraries' too, to standard error in one form.

    "auto" is JSON unless that is a terminal. Every line names *process*, where there are several.
    Called once, before other threads and after any fork.
    """
    stderr: TextIO | None = sys.stderr  # None where the process began without one
    is_terminal = stderr is not None and stderr.isatty()
    handler = LogHandler(stderr)
    number = logging.getLevelNamesMapping()[level.upper()]
    common: list[Any] = [structlog.stdlib.add_log_level, _stamp]
    if process:
        common.append(lambda _logger, _method, line: {**line, "process": process})
    other = structlog.dev.ConsoleRenderer(colors=is_terminal, timestamp_key="time")
    rendering: list[Any] = [partial(_to_text, colors=is_terminal, other=other)]
    if log_format == "json" or (log_format == "auto" and not is_terminal):
        rendering = [structlog.processors.format_exc_info, _to_json]
    elif is_terminal:  # where a progress bar may stand in the line
        rendering.append(lambda _logger, _method, line: f"{ERASE_LINE}{line}")
    structlog.configure(
        processors=[*common, *rendering],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=lambda *_names: handler,
        cache_logger_on_first_use=False,
    )
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*common, structlog.stdlib.add_logger_name],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *rendering],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(max(number, logging.WARNING))  # libraries talk when something is wrong


def _handlers() -> list[LogHandler]:
    """The one that `configure_log` made, if any."""
    return [one for one in logging.getLogger().handlers if isinstance(one, LogHandler)]


def lines_dropped() -> int:
    """How many lines of this process's log were dropped."""
    return sum(handler.dropped for handler in _handlers())


def finish_log(within_s: float = FINISH_S_MAX) -> None:
    """Write the lines that still wait. Called when all else has ended."""
    for handler in _handlers():
        handler.finish(within_s)


class RequestLog:
    """An `Observer` that writes a line for each request, and for each event an operator acts on.

    Batches and queue depths are metrics, not lines; a probe that passes is one at debug only.
    Called from any thread.
    """

    def __init__(self) -> None:
        self._log = structlog.get_logger().bind()

    def observe(self, event: Event) -> None:
        match event:
            case events.RequestServed():
                is_routine = event.route in PROBES and event.status < 400
                log = self._log.debug if is_routine else self._log.info
                log("request", **_request_fields(event))
            case events.BatchRan(failed=True):
                self._log.warning("batch_failed", **asdict(event))
            case events.ShardFinished():
                self._log.info("batch_shard", **asdict(event))
            case events.RowNotFinite():
                self._log.warning("row_not_finite", **asdict(event))
            case events.ModelLoaded(card=card):
                fields: dict[str, object] = {
                    "model": card.id,
                    "precision": card.precision,
                    "verified": card.verified,
                    "load_ms": round(event.load_s * 1e3),
                }
                if certificate := event.certificate:
                    fields["cosine_min"] = certificate.cosine_min
                    fields["cosine_mean"] = certificate.cosine_mean
                self._log.info("model_loaded", **{**fields, **card.notes})  # which may say more
            case events.PhaseChanged():
                self._log.info("phase", **asdict(event))


def _request_fields(event: events.RequestServed) -> dict[str, object]:
    """Fields of a request's line: milliseconds to the microsecond, and nothing that is absent."""
    fields: dict[str, object] = {
        "request_id": event.request_id,
        "method": event.method,
        "route": event.route,
        "status": event.status,
        "duration_ms": round(event.duration_s * 1e3, 3),
        "request_bytes": event.request_bytes,
        "answer_bytes": event.response_bytes,
        "code": event.code,
        "key_id": event.key_id,
        "client_request_id": event.client_request_id,
        "message": event.message,
        "ended_s": event.ended_s,
    }
    if event.model is not None:
        fields |= {
            "model": event.model,
            "inputs": event.input_count,
            "tokens": event.token_count,
            "tokenize_ms": round(event.tokenize_s * 1e3, 3),
            "queue_ms": round(event.queue_s * 1e3, 3),
            "compute_ms": round(event.compute_s * 1e3, 3),
            "encode_ms": round(event.encode_s * 1e3, 3),
        }
    return {name: value for name, value in fields.items() if value is not None}


def _stamp(_logger: object, _method: str, line: Any) -> Any:
    """Give *line* its time, in UTC: the event's own where it has one, else now."""
    ended_s = line.pop("ended_s", None)
    at = datetime.now(UTC) if ended_s is None else datetime.fromtimestamp(ended_s, UTC)
    line["time"] = at.isoformat(timespec="microseconds")[: -len("+00:00")] + "Z"
    return line


def _to_json(_logger: object, _method: str, line: Any) -> str:
    """Renderer for machines. A refusal's message may repeat a client's words: no file gets it."""
    line.pop("message", None)
    return msgspec.json.encode(line, enc_hook=repr).decode()  # several times faster than json.dumps


def _to_text(
    logger: Any, method: str, line: Any, *, colors: bool, other: structlog.dev.ConsoleRenderer
) -> str:
    """Renderer for people: a request is one short line, its status and duration first."""
    if line.get("event") != "request":
        return other(logger, method, line)
    status = f"{line['status']}"
    if colors:
        color = {"4": "33", "5": "31"}.get(status[0], "32")  # yellow, red; green
        status = f"\x1b[{color}m{status}\x1b[0m"
    shown = f"{line['duration_ms']:9.1f} ms  {line['method']} {line['route']}"
    if "model" in line:
        shown += f"  {line['model']}  {line['inputs']} inputs  {line['tokens']} tokens"
    if why := line.get("message") or line.get("code"):
        # A message may repeat a client's own word: nothing in it may move the cursor.
        shown += "  " + "".join(c if c.isprintable() else " " for c in why)[:MESSAGE_CHARS_MAX]
    return f"{line['time'][11:19]} {status} {shown}  {line['request_id']}"
