"""Memory stays flat: shapes are few, so what the plugin keeps for each of them is bounded."""

import ctypes
import mmap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import numpy as np
import pytest
from tests.backends.batches import batch_of
from tests.backends.conftest import random_ids

from trivec.backends.openvino import OpenVinoBackend, calibrate, quantise
from trivec.backends.openvino.quantise import FP32, make_tensors, split_int16
from trivec.backends.openvino.session import (
    LONG_TOKENS,
    Session,
    mappings_of,
    release_memory,
    released_meanwhile,
)
from trivec.checkpoints.checkpoint import Checkpoint

ROLLUP = Path("/proc/self/smaps_rollup")


def resident_mebibytes() -> float:
    line = next(line for line in ROLLUP.read_text().splitlines() if line.startswith("Rss:"))
    return int(line.split()[1]) / 1024


@pytest.mark.skipif(not ROLLUP.exists(), reason="resident memory is read from Linux's /proc")
def test_5000_texts_of_random_lengths_cost_no_more_memory_than_500(
    tiny_m3: Checkpoint, tmp_path: Path
) -> None:
    backend = OpenVinoBackend.load(tiny_m3, precision="int8", cores=1, cache_dir=tmp_path)
    draw = np.random.default_rng(0)

    def embed(count: int) -> None:
        for _ in range(count // 20):
            backend.run(batch_of(random_ids(draw.integers(1, 690, 20).tolist())), slot=0)

    embed(500)
    before = resident_mebibytes()
    embed(4500)
    assert resident_mebibytes() - before < 50


@pytest.mark.skipif(not ROLLUP.exists(), reason="resident memory is read from Linux's /proc")
def test_what_malloc_holds_free_goes_back_to_the_system() -> None:
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    blocks = [libc.malloc(ctypes.c_size_t(100_000)) for _ in range(1000)]
    for block in blocks:
        ctypes.memset(block, 1, 100_000)
    for block in blocks[:-1]:  # the last keeps malloc from cutting off its end by itself
        libc.free(block)
    before = resident_mebibytes()
    release_memory(())
    assert before - resident_mebibytes() > 50
    libc.free(blocks[-1])


class Mapping:
    """A mapped file that counts how often its pages are let go of."""

    def __init__(self) -> None:
        self.advice: list[int] = []

    def madvise(self, advice: int) -> None:
        self.advice.append(advice)


@pytest.mark.skipif(not hasattr(mmap, "MADV_DONTNEED"), reason="there is no such advice here")
def test_after_a_long_text_the_pages_of_the_table_are_let_go_of(
    tiny_m3: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    mapping = Mapping()
    monkeypatch.setattr("trivec.backends.openvino.session.mappings_of", lambda _: (mapping,))
    session = Session(tiny_m3, make_tensors(tiny_m3, FP32), FP32, slot_count=1)
    assert mapping.advice  # of what was read to compile
    mapping.advice.clear()
    session.run(batch_of(random_ids([LONG_TOKENS])), slot=0)
    assert mapping.advice == []
    session.run(batch_of(random_ids([LONG_TOKENS + 1])), slot=0)
    assert mapping.advice == [mmap.MADV_DONTNEED]


def test_the_pages_of_a_file_are_let_go_of_while_a_model_compiles() -> None:
    """The plugin reads all of it: beside what is packed, BGE-M3's would be 2.3 GB more."""
    advised = threading.Event()

    class Advised(Mapping):
        def madvise(self, advice: int) -> None:
            assert advice == mmap.MADV_DONTNEED
            advised.set()

    with released_meanwhile([cast("mmap.mmap", Advised())]):
        assert advised.wait(30)


@pytest.mark.skipif(not ROLLUP.exists(), reason="resident memory is read from Linux's /proc")
def test_what_was_read_to_check_its_values_does_not_stay_in_memory(tiny_m3: Checkpoint) -> None:
    tensors = make_tensors(tiny_m3, FP32)
    mapping, resident = "", 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            mapping = line
        elif line.startswith("Rss:") and str(tiny_m3.folder) in mapping:
            resident += int(line.split()[1])
    assert str(tiny_m3.folder) in Path("/proc/self/maps").read_text()
    assert resident == 0
    assert all(np.isfinite(one).all() for one in tensors.values())  # it is read again


def test_a_file_behind_many_arrays_is_one_mapping(tmp_path: Path) -> None:
    file = tmp_path / "tensors"
    np.arange(64, dtype=np.uint8).tofile(file)
    whole = np.memmap(file, np.uint8, mode="r")
    (mapping,) = mappings_of([whole[:8], whole[8:].reshape(7, 8), np.zeros(3)])
    assert mapping is cast("object", whole.base)


def test_what_only_the_probes_needed_is_given_back_before_fp32_runs(
    tiny_m3: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of BGE-M3 their tokenizer takes 0.2 GB, and the rows of the table that they read up to 1 GB."""
    events: list[str] = []

    def note(name: str) -> None:
        step = getattr(calibrate, name)

        def noted(*given: object, **named: object) -> object:
            events.append(name)
            return step(*given, **named)

        monkeypatch.setattr(calibrate, name, noted)

    @contextmanager
    def releasing(mappings: set[mmap.mmap]) -> Iterator[None]:
        assert mappings
        events.append("releasing")
        yield
        events.append("released")

    for name in ("make_probes", "release_memory", "open_session"):
        note(name)
    monkeypatch.setattr(calibrate, "released_meanwhile", releasing)
    calibrate.Calibration(tiny_m3, slot_count=1)
    assert events[:4] == ["make_probes", "release_memory", "releasing", "open_session"]
    assert events[4:] == ["release_memory", "open_session", "released"]


def test_a_table_is_let_go_of_as_it_is_quantised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantise, "TABLE_ROWS", 4)
    table, calls = np.random.default_rng(0).standard_normal((10, 8), np.float32), list[int]()
    parts = split_int16(table, lambda: calls.append(1))
    high, low, step = (parts[name].astype(np.float32) for name in ("high", "low", "step"))
    assert np.allclose((high * 256 + low) * step, table, atol=1e-3)
    assert len(calls) == 3
