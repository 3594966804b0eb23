"""Log lines leave by a thread of their own: a stuck reader holds nobody up and loses only lines."""

import io
import itertools
import json
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import ClassVar

import pytest
import structlog
from tests.telemetry.events import request

from trivec.telemetry import Metrics, RequestLog, configure_log, finish_log, lines_dropped
from trivec.telemetry import outlet as module
from trivec.telemetry.outlet import BYTES_MAX, LINES_MAX, PIECE_BYTES_MAX, Outlet, pieces

PATIENCE_S = 60.0  # then something hangs


def silent(count: int) -> None:
    """Hear of dropped lines and say nothing."""


class Held(io.StringIO):
    """A stream that takes nothing until its gate opens."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.entered = threading.Event()

    def write(self, text: str) -> int:
        self.entered.set()
        assert self.gate.wait(PATIENCE_S)
        return super().write(text)


class Full(io.StringIO):
    """A stream on a full disk."""

    def flush(self) -> None:
        raise OSError(28, "No space left on device")


def read_to_end(fd: int) -> None:
    with open(fd, "rb") as reader:
        reader.read()


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Standard error is a pipe; the end that nobody reads yet."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    reading, writing = os.pipe()
    stream = open(writing, "w", encoding="utf-8")  # noqa: SIM115 # closed when it has a reader
    monkeypatch.setattr(sys, "stderr", stream)
    configure_log("json")
    yield reading
    rest = threading.Thread(target=read_to_end, args=(reading,))
    rest.start()
    finish_log(PATIENCE_S)
    stream.close()
    rest.join(PATIENCE_S)
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()


def in_time(work: Callable[[], object]) -> bool:
    """Whether *work* ends; a thread that does not is left behind."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(PATIENCE_S)
    return not thread.is_alive()


def test_lines_come_out_whole_and_in_order() -> None:
    out = io.StringIO()
    outlet = Outlet(out, told=silent)
    for i in range(1000):
        outlet.write(f"{i}\n")
    outlet.close(PATIENCE_S)
    assert out.getvalue().split() == [str(i) for i in range(1000)]
    assert outlet.dropped == 0


def test_a_pipe_that_nobody_reads_holds_no_request_up(
    pipe: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LINES_MAX", 200)  # as many again are in the writer's hands
    log, count = RequestLog(), 1500  # the pipe itself holds about 200

    def serve() -> None:
        for _ in range(count):
            log.observe(request())

    assert in_time(serve), "the log waited for its reader"
    assert lines_dropped() > 0
    assert f"trivec_log_lines_dropped_total {float(lines_dropped())}" in page()
    with open(pipe, encoding="utf-8", closefd=False) as reader:
        seen, told = 0, 0
        while seen + told < count:
            line = json.loads(reader.readline())
            seen += line["event"] == "request"
            told += line.get("count", 0) if line["event"] == "log_lines_dropped" else 0
    assert (seen + told, told) == (count, lines_dropped())


def page() -> str:
    return Metrics(lines_dropped=lines_dropped).page().decode()


def test_what_waits_is_bounded_and_the_rest_counted() -> None:
    out = Held()
    outlet = Outlet(out, told=silent)
    outlet.write("first\n")
    assert out.entered.wait(PATIENCE_S)
    for _ in range(LINES_MAX + 7):
        outlet.write("line\n")
    assert outlet.dropped == 7
    out.gate.set()
    outlet.close(PATIENCE_S)
    assert out.getvalue().count("line") == LINES_MAX


def test_a_stream_that_fails_costs_its_lines_and_nothing_else() -> None:
    told: list[int] = []
    outlet = Outlet(Full(), told=told.append)
    outlet.write("lost\n")
    outlet.close(PATIENCE_S)
    assert (outlet.dropped, told) == (1, [])


def test_leaving_does_not_wait_for_a_reader_that_is_stuck() -> None:
    out = Held()
    outlet = Outlet(out, told=silent)
    outlet.write("stuck\n")
    assert out.entered.wait(PATIENCE_S)
    assert in_time(lambda: outlet.close(0.01))
    out.gate.set()


def test_a_line_after_the_end_is_written_at_once() -> None:
    out = io.StringIO()
    outlet = Outlet(out, told=silent)
    outlet.close(PATIENCE_S)
    outlet.write("late\n")
    assert out.getvalue() == "late\n"


def test_lines_leave_in_pieces_that_nobody_can_write_into() -> None:
    lines = [f"{number} {'é' * (number % 700)}\n" for number in range(300)]
    sent = list(pieces(lines))
    assert [line for piece in sent for line in piece] == lines
    assert max(len("".join(piece).encode()) for piece in sent) <= PIECE_BYTES_MAX
    following = itertools.pairwise(sent)
    assert all(len("".join([*one, two[0]]).encode()) > PIECE_BYTES_MAX for one, two in following)


def test_a_line_longer_than_a_piece_leaves_by_itself() -> None:
    long = "x" * PIECE_BYTES_MAX + "\n"
    assert list(pieces(["a\n", long, "b\n"])) == [["a\n"], [long], ["b\n"]]
    assert list(pieces([])) == []


def test_each_piece_is_one_write() -> None:
    class Counting(io.StringIO):
        writes: ClassVar[list[str]] = []

        def write(self, text: str) -> int:
            self.writes.append(text)
            return super().write(text)

    stream = Counting()
    outlet = Outlet(stream, told=silent)
    for number in range(500):
        outlet.write(f"{number} {'x' * 100}\n")
    outlet.close(PATIENCE_S)
    assert len(stream.getvalue().splitlines()) == 500
    assert max(map(len, stream.writes)) <= PIECE_BYTES_MAX


def test_what_waits_is_bounded_in_bytes_too() -> None:
    stream = Held()
    outlet = Outlet(stream, told=silent)
    line = "x" * (BYTES_MAX // 4)
    for _ in range(100):
        outlet.write(line)
    assert outlet.dropped >= 100 - 2 * 4, "those that wait, and those that the thread has taken"
    stream.gate.set()
