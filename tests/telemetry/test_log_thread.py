"""Log lines are written by a thread of their own: a stuck stderr costs lines, and nothing else."""

import io
import json
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator

import pytest
import structlog
from tests.telemetry.events import request

from trivec.telemetry import Metrics, RequestLog, configure_log, finish_log, lines_dropped
from trivec.telemetry import logging as module

WAIT_S = 60.0  # then something hangs
PIECE_BYTES_MAX = 4096


class Stream(io.StringIO):
    """A stderr that remembers its writes, and takes them only while its gate is open."""

    def __init__(self, *, is_open: bool = True) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.entered = threading.Event()
        self.writes: list[str] = []
        if is_open:
            self.gate.set()

    def write(self, text: str) -> int:
        self.entered.set()
        assert self.gate.wait(WAIT_S)
        self.writes.append(text)
        return super().write(text)

    def events(self) -> list[str]:
        return [json.loads(line)["event"] for line in self.getvalue().splitlines()]


class FullDisk(Stream):
    def flush(self) -> None:
        raise OSError(28, "No space left on device")


@pytest.fixture(autouse=True)
def _restored_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()


@pytest.fixture
def log_to(monkeypatch: pytest.MonkeyPatch) -> Callable[[Stream | None], structlog.BoundLogger]:
    """Makes a stream the process's stderr and the log's end."""

    def configure(stream: Stream | None) -> structlog.BoundLogger:
        monkeypatch.setattr(sys, "stderr", stream)
        configure_log("json")
        log: structlog.BoundLogger = structlog.get_logger()
        return log

    return configure


LogTo = Callable[[Stream | None], structlog.BoundLogger]


def ends_in_time(work: Callable[[], object]) -> bool:
    """Whether *work* ends; a thread that does not is left behind."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(WAIT_S)
    return not thread.is_alive()


def test_lines_come_out_whole_and_in_order(log_to: LogTo) -> None:
    stream = Stream()
    log = log_to(stream)
    for number in range(1000):
        log.info(str(number))
    finish_log(WAIT_S)
    assert stream.events() == [str(number) for number in range(1000)]
    assert lines_dropped() == 0


def test_a_pipe_that_nobody_reads_holds_no_request_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WAITING_BYTES_MAX", 100_000)
    reading, writing = os.pipe()  # which itself holds about 200 lines
    count = 1500
    with open(writing, "w", encoding="utf-8") as stderr, open(reading, encoding="utf-8") as reader:
        monkeypatch.setattr(sys, "stderr", stderr)
        configure_log("json")
        log = RequestLog()

        def observe() -> None:
            for _ in range(count):
                log.observe(request())

        assert ends_in_time(observe)
        dropped = lines_dropped()
        assert dropped > 0
        page = Metrics(lines_dropped=lines_dropped).page().decode()
        assert f"trivec_log_lines_dropped_total {float(dropped)}" in page
        seen = said = 0
        while seen + said < count:
            line = json.loads(reader.readline())
            seen += line["event"] == "request"
            said += line.get("count", 0) if line["event"] == "log_lines_dropped" else 0
        assert (seen + said, said) == (count, dropped)
        finish_log(WAIT_S)


def test_the_lines_that_wait_are_bounded_in_bytes_and_the_rest_counted(
    log_to: LogTo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "WAITING_BYTES_MAX", 40_000)
    stream = Stream(is_open=False)
    log = log_to(stream)
    log.info("first")
    assert stream.entered.wait(WAIT_S)
    for _ in range(100):
        log.info("x" * 10_000)
    assert lines_dropped() == 97
    stream.gate.set()
    finish_log(WAIT_S)
    assert len(stream.events()) == 1 + 3 + 1
    assert '"count":97' in stream.getvalue()


@pytest.mark.parametrize(
    "make_stream",
    [
        pytest.param(FullDisk, id="on-a-full-disk"),
        pytest.param(lambda: None, id="that-was-closed-before-the-start"),
    ],
)
def test_a_stderr_that_takes_nothing_costs_its_lines_only(
    log_to: LogTo, make_stream: Callable[[], Stream | None]
) -> None:
    stream = make_stream()
    log = log_to(stream)
    log.info("lost")
    finish_log(WAIT_S)
    assert lines_dropped() == 1
    assert stream is None or "log_lines_dropped" not in stream.getvalue()


def test_a_stderr_that_is_closed_meanwhile_costs_its_lines_only(log_to: LogTo) -> None:
    stream = Stream()
    log = log_to(stream)
    stream.close()
    log.info("lost")
    finish_log(WAIT_S)
    assert lines_dropped() == 1


def test_a_record_that_cannot_be_formatted_is_counted_and_nothing_more(log_to: LogTo) -> None:
    stream = Stream()
    log_to(stream)
    logging.getLogger("granian").warning("worker %d is late", "no number")
    logging.getLogger("granian").warning("worker %d is late", 3)
    finish_log(WAIT_S)
    assert lines_dropped() == 1
    assert "log_lines_dropped" in stream.events()
    assert "worker 3 is late" in stream.events()


def test_the_end_of_the_process_does_not_wait_for_a_stuck_reader(log_to: LogTo) -> None:
    stream = Stream(is_open=False)
    log_to(stream).info("stuck")
    assert stream.entered.wait(WAIT_S)
    assert ends_in_time(lambda: finish_log(0.01))
    stream.gate.set()


def test_a_line_after_the_end_is_written_at_once(log_to: LogTo) -> None:
    stream = Stream()
    log = log_to(stream)
    finish_log(WAIT_S)
    log.info("late")
    assert stream.events() == ["late"]


def test_lines_that_were_written_make_room_for_others(
    log_to: LogTo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "WAITING_BYTES_MAX", 40_000)
    stream = Stream()
    log = log_to(stream)
    log.info("x" * 30_000)
    finish_log(WAIT_S)
    for _ in range(10):
        log.info("x" * 30_000)
    assert (len(stream.events()), lines_dropped()) == (11, 0)


def test_lines_leave_in_pieces_that_another_process_cannot_write_into(log_to: LogTo) -> None:
    stream = Stream()
    log = log_to(stream)
    for number in range(300):
        log.info(f"{number} {'é' * (number % 700)}")
    log.info("x" * PIECE_BYTES_MAX)
    finish_log(WAIT_S)
    sizes = {len(piece.encode()) for piece in stream.writes[:-1]}
    assert max(sizes) <= PIECE_BYTES_MAX
    assert all(piece.endswith("\n") for piece in stream.writes)
    assert stream.writes[-1].count("\n") == 1, "a line longer than a piece leaves by itself"
    assert len(stream.writes) < 150, "many lines share a write"
