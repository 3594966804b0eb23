"""Where log lines leave the process: one thread writes what has gathered, so that nobody else waits.

A pipe whose reader is stuck stops whoever writes to it. Here that is a thread with nothing else to
do; lines that find no room meanwhile are dropped and counted. It does not know what a line says.
"""

import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TextIO

LINES_MAX = 10_000  # waiting; about 5 MB of requests, some seconds of the busiest server
BYTES_MAX = 16 * 1024 * 1024  # of memory that lines hold while they wait
PIECE_BYTES_MAX = 4096  # what Linux writes to a pipe in one go, whoever else writes to it
GATHER_S = 0.05  # a line waits this long for company: one write and one wake-up for many


class Outlet:
    """A text stream whose `write` never blocks. Each call of it is one line.

    *told* hears how many lines were dropped, once some could be written again; it may write.
    """

    def __init__(self, stream: TextIO, *, told: Callable[[int], None]) -> None:
        self._stream = stream
        self._told = told
        self._lines: deque[str] = deque()
        self._some = threading.Event()  # there are lines
        self._closing = threading.Event()
        self._counting = threading.Lock()
        self._thread: threading.Thread | None = None
        self._held_bytes = 0
        self.dropped = 0  # lines, since the start

    def write(self, line: str) -> int:
        if self._closing.is_set():
            self._put_out(line)
        elif threading.current_thread() is not self._thread and (
            len(self._lines) >= LINES_MAX or self._held_bytes + sys.getsizeof(line) > BYTES_MAX
        ):
            self._drop(1)
        else:
            with self._counting:
                self._held_bytes += sys.getsizeof(line)
            self._lines.append(line)
            if not self._some.is_set():
                self._some.set()
                self._start()
        return len(line)

    def flush(self) -> None:
        """Nothing: lines leave by themselves, within `GATHER_S` where somebody takes them."""

    def isatty(self) -> bool:
        return self._stream.isatty()

    def close(self, within_s: float) -> None:
        """Write what waits, unless that takes longer than *within_s*; afterwards write at once."""
        self._closing.set()
        self._some.set()
        if self._thread is not None:
            self._thread.join(within_s)

    def _start(self) -> None:
        """The thread begins with the first line, not before: the process may fork until then."""
        if self._thread is None:
            with self._counting:
                if self._thread is None:
                    self._thread = threading.Thread(target=self._run, name="log", daemon=True)
                    self._thread.start()

    def _run(self) -> None:
        told = 0
        while True:
            self._some.wait()
            self._closing.wait(GATHER_S)
            self._some.clear()
            lines = [self._lines.popleft() for _ in range(len(self._lines))]
            with self._counting:
                self._held_bytes -= sum(map(sys.getsizeof, lines))
            lost = sum(len(piece) for piece in pieces(lines) if not self._put_out("".join(piece)))
            if lost:
                self._drop(lost)
            elif self.dropped > told:
                now = self.dropped
                self._told(now - told)
                told = now
            if self._closing.is_set() and not self._lines:
                return

    def _put_out(self, text: str) -> bool:
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):  # the reader has gone, the disk is full, or it was closed
            return False
        return True

    def _drop(self, count: int) -> None:
        with self._counting:
            self.dropped += count


def pieces(lines: Sequence[str]) -> Iterator[Sequence[str]]:
    """*lines* in groups that other processes on the same pipe cannot write into.

    A group is at most `PIECE_BYTES_MAX` in UTF-8; a longer line is one by itself, and may be torn.
    """
    begin, size = 0, 0
    for end, line in enumerate(lines):
        length = len(line.encode())
        if end > begin and size + length > PIECE_BYTES_MAX:
            yield lines[begin:end]
            begin, size = end, 0
        size += length
    if begin < len(lines):
        yield lines[begin:]
