"""A whole server, supervised, whose device is of a fixed rate and obeys certain words.

Run by the forms as `python -m benchmarks.soak.stand DATA_DIR [--tokens-per-s R] [--backend KIND]
[--call-s-min S]`; settings come from the environment as for `trivec serve`. SIGUSR1 makes the serving
process say how many tasks, threads and files it has.
"""

import argparse
import asyncio
import os
import signal
import socket
import sys
import threading
from pathlib import Path

from benchmarks.soak.faulty import Fault
from benchmarks.soak.service import device, faulty_model, opened

from trivec.build import Choice, Front, Models, Running, make_tokenizers, set_up
from trivec.cli.greeting import Greeting
from trivec.engine import worker
from trivec.server.crew import Crew, Post
from trivec.server.listening import listen
from trivec.server.serving import live
from trivec.server.supervisor import Heart
from trivec.settings import Settings, load_settings
from trivec.telemetry import configure_log, finish_log

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


def serve(
    settings: Settings, listener: socket.socket, heart: Heart, given: argparse.Namespace
) -> int:
    configure_log("json", level=settings.log_level)
    worker.CALL_S_MIN = given.call_s_min

    def load(front: Front) -> Models:
        checkpoint = opened(given.data_dir)
        inner = device(checkpoint, given.backend, given.data_dir, tokens_per_s=given.tokens_per_s)
        model = faulty_model(checkpoint, inner, WORDS)
        choice = Choice(given.backend, "cpu", "a soak")
        tokenizers = make_tokenizers([checkpoint], front=front, cores=2)
        return set_up([model], choice, front=front, tokenizers=tokenizers)

    class Counting(Greeting):
        def ready(self, models: Running) -> None:
            count_when_asked(asyncio.get_running_loop())
            super().ready(models)

    herald = Counting(settings, port=listener.getsockname()[1], say=say)

    try:
        return live(settings, listener, load=load, heart=heart, herald=herald)
    finally:
        finish_log()


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
    server = Post("server", lambda heart: serve(settings, listener, heart, given), listener)
    os._exit(Crew([server], heartbeat_s_max=settings.life.heartbeat_s_max, say=say).run())


main()
