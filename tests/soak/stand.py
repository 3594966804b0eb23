"""A whole server whose device is of a fixed rate and obeys certain words.

Run by the forms as `python -m tests.soak.stand DATA_DIR [--tokens-per-s R] [--backend KIND]
[--call-s-min S]`; settings come from the environment as for `trivec serve`. SIGUSR1 makes it say how
many tasks, threads and files it has.
"""

import argparse
import asyncio
import os
import signal
import socket
import sys
import threading
from pathlib import Path

from tests.soak.faulty import Fault
from tests.soak.service import device, faulty_model, opened

from trivec.build import (
    Choice,
    Models,
    ServerParts,
    make_tokenizers,
    set_up,
)
from trivec.cli.serve import Greeting
from trivec.engine import worker
from trivec.server.machine import listen
from trivec.server.processes import exit_code_of
from trivec.server.server import serve_http
from trivec.settings import Settings, load_settings

WORDS = {"hang": Fault.HANG, "lost": Fault.LOSE, "poison": Fault.RAISE, "dies": Fault.DIE}
SEND_BUFFER_BYTES = 64 * 1024  # so that a slow reader of a modest answer is soon felt


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def count_when_asked(loop: asyncio.AbstractEventLoop) -> None:
    """On SIGUSR1, a line with what could leak."""

    def count() -> None:
        tasks = len(asyncio.all_tasks(loop))
        files = len(os.listdir("/proc/self/fd"))
        resident = Path("/proc/self/statm").read_text().split()[1]
        kib = int(resident) * os.sysconf("SC_PAGE_SIZE") // 1024
        say(f"counted tasks={tasks} threads={threading.active_count()} fds={files} rss_kib={kib}")

    loop.add_signal_handler(signal.SIGUSR1, count)


def serve(settings: Settings, listener: socket.socket, given: argparse.Namespace) -> int:
    worker.CALL_S_MIN = given.call_s_min

    def load(parts: ServerParts) -> Models:
        checkpoint = opened(given.data_dir)
        inner = device(checkpoint, given.backend, given.data_dir, tokens_per_s=given.tokens_per_s)
        model = faulty_model(checkpoint, inner, WORDS)
        choice = Choice(given.backend, "cpu", "a soak")
        tokenizers = make_tokenizers([checkpoint], context=parts, cores=2)
        return set_up([model], choice, context=parts, tokenizers=tokenizers)

    class Counting(Greeting):
        def ready(self, models: Models) -> None:
            count_when_asked(asyncio.get_running_loop())
            super().ready(models)

    greeting = Counting(settings, port=listener.getsockname()[1], say=say)
    return serve_http(
        settings,
        listener,
        load=load,
        on_first_key=greeting.first_key,
        on_ready=greeting.ready,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data_dir", type=Path)
    parser.add_argument("--tokens-per-s", type=float, default=float("inf"))
    parser.add_argument("--backend", default="fake")
    parser.add_argument("--call-s-min", type=float, default=worker.CALL_S_MIN)
    given = parser.parse_args()
    settings = load_settings({"data_dir": str(given.data_dir), "port": 0}, os.environ)
    listener = listen(settings.host, settings.port)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
    os._exit(exit_code_of(lambda: serve(settings, listener, given), settings, say=say))


main()
