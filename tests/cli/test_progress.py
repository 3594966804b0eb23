"""What takes long: a bar on a terminal, here a pseudo-terminal; elsewhere lines, or nothing."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path

import pytest
from msgspec.structs import replace
from tests.checkpoints.hub import Hub, serve_hub
from tests.checkpoints.tiny import write_tiny
from typer.testing import CliRunner

from trivec.checkpoints import hub as pulling
from trivec.checkpoints.catalogue import CatalogueEntry, entry_of
from trivec.cli import app, bench, common, models

ESCAPE = "\x1b["
BAR = re.compile("[━╸╺]{3}")


class Terminal:
    """The screen's side of a pseudo-terminal: all that was written to it, and waits for more."""

    def __init__(self, screen: int) -> None:
        self.raw = ""
        self._screen = screen
        self._news = threading.Condition()
        self.is_closed = False
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        written = b""
        while not self.is_closed:
            try:
                read = os.read(self._screen, 65536)
            except OSError:  # nobody has it open any more
                read = b""
            with self._news:
                written += read
                self.raw, self.is_closed = written.decode(errors="replace"), not read
                self._news.notify_all()

    @property
    def text(self) -> str:
        """Without colours: each state of a line that is drawn again is a line."""
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.raw).replace("\r", "\n")

    def wait_for(self, words: str) -> None:
        with self._news:
            self._news.wait_for(lambda: words in self.text or self.is_closed, timeout=120)
        assert words in self.text


@contextmanager
def a_terminal() -> Iterator[tuple[Terminal, int]]:
    """A terminal, and the descriptor that a program writes to; closed at the end."""
    screen, program = pty.openpty()
    terminal = Terminal(screen)
    try:
        yield terminal, program
    finally:
        os.close(program)
        terminal.reader.join(60)
        os.close(screen)


Run = Callable[..., Terminal]


@pytest.fixture
def on_a_terminal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Runs a command in this process, with its messages, or all it prints, on a terminal."""
    monkeypatch.setenv("TRIVEC_DATA_DIR", str(tmp_path / "own"))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")

    def run(*words: str, streams: tuple[str, ...] = ("stderr",)) -> Terminal:
        with a_terminal() as (terminal, program), monkeypatch.context() as patch:
            for name in streams:
                patch.setattr(sys, name, os.fdopen(os.dup(program), "w", buffering=1))
            app(words, standalone_mode=False)
            for name in streams:
                getattr(sys, name).close()
        return terminal

    return run


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[CatalogueEntry]:
    """A model that a hub on loopback has, and the command knows."""
    entry = replace(
        entry_of("baai/bge-m3"), id="org/tiny", hub_id="Org/tiny", revision=None, pins={}
    )
    hub: Hub
    with serve_hub(write_tiny(tmp_path / "published"), model_id="Org/tiny") as hub:
        monkeypatch.setattr(models, "entry_of", lambda _name: entry)
        monkeypatch.setattr(pulling, "pull", partial(pulling.pull, endpoint=hub.endpoint))
        yield entry


def test_a_pull_has_a_bar_of_bytes_and_of_hashing(
    on_a_terminal: Run, tiny: CatalogueEntry, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal = on_a_terminal("models", "pull", tiny.id)
    shown = terminal.text
    assert re.search(r"100% 0:\d\d:\d\d pulling model.safetensors, ([\d.]+) of \1 MB", shown)
    assert "hashing model.safetensors" in shown
    assert BAR.search(shown)
    assert f"{ESCAPE}?25l" not in terminal.raw, "a killed process would leave no cursor"
    assert Path(capsys.readouterr().out.strip()).is_dir(), "standard output is the folder alone"


def test_its_clock_goes_on_from_step_to_step(
    on_a_terminal: Run, tiny: CatalogueEntry, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Hourly(common.LineConsole):
        def __init__(self) -> None:
            super().__init__()
            self.get_time = partial(next, count(0.0, 3600.0))

    monkeypatch.setattr(common, "LineConsole", Hourly)
    shown = on_a_terminal("models", "pull", tiny.id).text
    ended = [int(hours) for hours in re.findall(r"100% (\d+):00:00", shown)]
    assert ended == sorted(ended)
    assert ended[-1] > ended[0]


def test_where_there_is_no_terminal_a_long_pull_says_a_line_now_and_then(
    tiny: CatalogueEntry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = CliRunner().invoke(app, ["models", "pull", tiny.id, "--data-dir", str(tmp_path / "a")])
    assert "pulling" not in quick.stderr
    at_once = partial(common.shown_progress, first_line_s=0.0)
    monkeypatch.setattr(models, "shown_progress", at_once)
    slow = CliRunner().invoke(app, ["models", "pull", tiny.id, "--data-dir", str(tmp_path / "b")])
    first = slow.stderr.splitlines()[0]
    assert re.fullmatch(r"pulling \S+, [\d.]+ of [\d.]+ MB", first)
    assert ESCAPE not in slow.output


def test_a_first_start_says_what_its_certificate_waits_for_and_bench_ends_with_a_chart(
    on_a_terminal: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = on_a_terminal("bench", "--seconds", "0.1", streams=("stdout", "stderr")).text
    steps = [
        "hashing model.safetensors",
        "all-minilm-l6-v2: compiling fp32, to compare int8 with",
        "all-minilm-l6-v2: running the probes in fp32",
        "all-minilm-l6-v2: quantising, int8",
        "all-minilm-l6-v2: comparing int8",
        "all-minilm-l6-v2: warming up",
        "measuring texts of 16 tokens",
        "measuring texts of 128 tokens",
        "model all-minilm-l6-v2",
    ]
    places = [shown.find(step) for step in steps]
    assert -1 not in places, dict(zip(steps, places, strict=True))
    assert places == sorted(places)
    assert re.search(r"100% 0:\d\d:\d\d hashing", shown)
    assert not re.search(r"% 0:\d\d:\d\d all-minilm-l6-v2", shown), "nobody knows the share"
    chart = [line for line in shown.split("model all-minilm-l6-v2")[-1].split("\n") if line]
    lengths = [line.count("━") for line in chart[-2:]]
    assert max(lengths) == bench.CHART_COLUMNS, "the fastest has the longest bar"

    prepared = on_a_terminal("models", "verify", "--prepared").text
    assert "hashing tensors.safetensors" in prepared
    capsys.readouterr()
    on_a_terminal("bench", "--seconds", "0.1", "--json")
    assert json.loads(capsys.readouterr().out)["model"] == "all-minilm-l6-v2"


def _serve(tmp_path: Path, *, stderr: int) -> "subprocess.Popen[str]":
    words = ["serve", "--port", "0", "--backend", "fake", "--data-dir", str(tmp_path / "served")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TERM": "xterm"}
    return subprocess.Popen(
        [sys.executable, "-m", "trivec", *words], env=environment, text=True, stderr=stderr
    )


def test_a_start_on_a_terminal_has_a_bar_a_log_for_people_and_the_page(tmp_path: Path) -> None:
    with a_terminal() as (terminal, program):
        process = _serve(tmp_path, stderr=program)
        try:
            terminal.wait_for("Try it:")
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
    before, _, greeting = terminal.text.partition("is ready.")
    assert "hashing model.safetensors" in before
    assert BAR.search(before)
    assert re.search(r"page +http://127.0.0.1:\d+/\n", greeting)
    assert not BAR.search(greeting)
    assert '{"' not in before, "the log is for people"
    assert f"{ESCAPE}?25l" not in terminal.raw


def test_a_start_that_is_stopped_leaves_no_bar(tmp_path: Path) -> None:
    with a_terminal() as (terminal, program):
        process = _serve(tmp_path, stderr=program)
        terminal.wait_for("hashing model.safetensors")
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    _, _, after_its_log = terminal.raw.rpartition("stopped")
    assert f"\r{ESCAPE}K" in after_its_log, "the line is erased, whatever the bar drew there"


def test_a_start_elsewhere_writes_its_log_and_no_more(tmp_path: Path) -> None:
    process = _serve(tmp_path, stderr=subprocess.PIPE)
    assert process.stderr is not None
    said = ""
    for line in process.stderr:
        said += line
        if "Try it:" in line:
            process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    process.stderr.close()
    assert "hashing" not in said
    assert ESCAPE not in said
    assert '"phase":"ready"' in said
