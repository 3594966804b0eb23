"""A real `trivec serve` in a process of its own, on a free port of this machine."""

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType

import httpx

TRIVEC = str(Path(sys.executable).with_name("trivec"))
SETTLE_S = 60.0


class Server:
    """The process, what it says on stderr, and a client for it. Waits are on events, never polls."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process
        self.said: list[str] = []
        self._heard = threading.Condition()
        self._ear = threading.Thread(target=self._listen, daemon=True)
        self._ear.start()

    def _listen(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._heard:
                self.said.append(line.rstrip("\n"))
                self._heard.notify_all()
        with self._heard:
            self.said.append("<end>")
            self._heard.notify_all()

    def wait_until_it_says(self, pattern: str, *, times: int = 1) -> "re.Match[str]":
        """The match in the *times*-th line that has *pattern*; fails when it ends before."""
        wanted = re.compile(pattern)

        def found() -> list["re.Match[str]"]:
            return [match for line in self.said if (match := wanted.search(line))]

        with self._heard:
            self._heard.wait_for(
                lambda: len(found()) >= times or "<end>" in self.said, timeout=SETTLE_S
            )
            matches = found()
        assert len(matches) >= times, f"never said {pattern!r}:\n" + "\n".join(self.said)
        return matches[times - 1]

    @property
    def url(self) -> str:
        return self.wait_until_it_says(r"listening  (\S+)")[1]

    @property
    def key(self) -> str:
        """The first key, from the file that is named where stderr is no terminal."""
        return Path(self.wait_until_it_says(r"key +in (.+)$")[1]).read_text("utf-8").strip()

    def client(self) -> httpx.Client:
        headers = {"Authorization": f"Bearer {self.key}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60)

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def ask_again(self) -> None:
        """A second request to stop; one that comes too close to the first counts as its echo."""
        with self._heard:
            for _ in range(600):
                if any('"phase":"stopped"' in line for line in self.said):
                    return
                assert "<end>" not in self.said
                self.signal(signal.SIGTERM)
                self._heard.wait(timeout=0.1)
        raise AssertionError("asked again and again, and never stopped")

    def close(self) -> None:
        self._ear.join(timeout=SETTLE_S)
        assert self.process.stderr is not None
        self.process.stderr.close()

    def exit_code(self) -> int:
        code = self.process.wait(timeout=SETTLE_S)
        self._ear.join(timeout=SETTLE_S)
        return code


def clean_environment(extra: Mapping[str, str] = MappingProxyType({})) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TRIVEC_")}
    return {**kept, **extra}


@contextmanager
def running(
    data_dir: Path, *arguments: str, environ: Mapping[str, str] = MappingProxyType({})
) -> Iterator[Server]:
    """A server on a free port; killed at the end if it still runs."""
    command = [TRIVEC, "serve", "--port", "0", "--data-dir", str(data_dir), *arguments]
    with started(command, environ) as server:
        yield server


@contextmanager
def started(
    command: Sequence[str], environ: Mapping[str, str] = MappingProxyType({})
) -> Iterator[Server]:
    """The server that *command* starts."""
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=clean_environment(environ)
    )
    server = Server(process)
    try:
        yield server
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        server.close()


def refused(*arguments: str, environ: Mapping[str, str] = MappingProxyType({})) -> str:
    """What `trivec serve` says, in one line, when it refuses to start; it must exit with 2."""
    run = subprocess.run(
        [TRIVEC, "serve", *arguments],
        env=clean_environment(environ),
        capture_output=True,
        text=True,
        timeout=SETTLE_S,
        check=False,
    )
    assert run.returncode == 2, run.stderr
    assert run.stdout == ""
    lines = run.stderr.splitlines()
    assert len(lines) == 1, run.stderr
    assert lines[0].startswith("trivec: ")
    return lines[0]
