"""A GPU measurement that is stopped half-way has kept, and prints, what it had."""

import json
import os
import signal
from pathlib import Path

import pytest
from benchmarks.gpu_record import PART_S, Record, TimeBudget


def printed(capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    (line,) = capsys.readouterr().out.splitlines()
    found: dict[str, object] = json.loads(line)
    return found


def test_the_file_is_whole_after_every_part(tmp_path: Path) -> None:
    file = tmp_path / "results" / "gpu.json"
    record = Record(file, ["engine", "http"])
    record.put("engine", {"round": 1})
    assert json.loads(file.read_text())["unfinished"] == ["engine", "http"]
    record.finish("engine", {"round": 2})
    kept = json.loads(file.read_text())
    assert kept["engine"] == {"round": 2}
    assert kept["unfinished"] == record.to_come == ["http"]


def test_a_run_that_is_told_to_stop_prints_what_it_has(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = Record(tmp_path / "gpu.json", ["engine", "http"])
    before = signal.getsignal(signal.SIGTERM)

    def run() -> None:
        with record.printed_whatever_happens():
            record.finish("engine", {"share": 0.6})
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit) as stopped:
        run()
    assert stopped.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
    found = printed(capsys)
    assert (found["engine"], found["unfinished"]) == ({"share": 0.6}, ["http"])


def test_a_run_that_fails_prints_what_it_has(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = Record(tmp_path / "gpu.json", ["engine"])
    with pytest.raises(RuntimeError), record.printed_whatever_happens():
        raise RuntimeError("the driver went away")
    assert printed(capsys)["unfinished"] == ["engine"]


def test_time_is_kept_for_the_parts_to_come() -> None:
    time_left = TimeBudget(sum(PART_S.values()))
    assert time_left.has(PART_S["engine"] - 1, then=["host", "peers", "http", "nan_zoo"])
    assert not time_left.has(PART_S["engine"] + 1, then=["host", "peers", "http", "nan_zoo"])
