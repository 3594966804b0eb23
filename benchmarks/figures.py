"""Figures of a measurement: spread over repeats, percentiles, the machine, and where they are kept.

It does not know what is measured.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from trivec import __version__

LOOK_S = 0.5
RESULTS = Path(__file__).parent / "results"  # of the page; one file a benchmark and model
LOCAL = Path(__file__).parent / "local"  # of everybody else, which git ignores

# Hides what is beyond AVX2 from OpenVINO, torch, MKL and CTranslate2; ONNX Runtime has no such switch.
MASKED = ["OV_CPU_MAX_ISA", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "CT2_FORCE_CPU_ISA"]
MASK = {"ATEN_CPU_CAPABILITY": "avx2"} | dict.fromkeys(MASKED, "AVX2")


@dataclass(frozen=True, slots=True)
class Spread:
    """Repeats of one number. The median is quoted; lowest and highest tell how noisy it was."""

    median: float
    lowest: float
    highest: float
    repeats: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        found = (statistics.median(values), min(values), max(values))
        # Five digits: more than any measurement here has.
        median, lowest, highest = (float(f"{value:.5g}") for value in found)
        return cls(median, lowest, highest, len(values))

    def __str__(self) -> str:
        return f"{self.median:,.5g} ({self.lowest:,.4g} to {self.highest:,.4g})"


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least *share* (0 to 1) of *values* do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -(-int(share * 1000) * len(ordered) // 1000) - 1))]


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Spread:
    """Round by round, so that what slows a whole round cancels out."""
    return Spread.of([a / b for a, b in zip(numerator, denominator, strict=True)])


class Masked(argparse.Action):
    """Sets `MASK` for this process and for all that it starts."""

    def __call__(self, *_: object, **__: object) -> None:
        os.environ.update(MASK)


def parser(about: str | None, **defaults: object) -> argparse.ArgumentParser:
    """Options that every measurement has, and one for each of *defaults*."""
    made = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--record", action="store_true", help="keep it for docs/performance.md")
    made.add_argument("--avx2", action=Masked, nargs=0, default=argparse.SUPPRESS, help="AVX2 only")
    for name, default in defaults.items():
        made.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    return made


def keep(name: str, result: Mapping[str, Any], *, record: bool) -> None:
    """File *result* under *name*, for the page or for whoever ran it; print it as the last line."""
    name += "-avx2" if result["provenance"]["masked"] else ""
    folder = RESULTS if record else LOCAL
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


def provenance(*packages: str) -> dict[str, object]:
    """Where and when a result was taken: without it a number is a rumour.

    *packages* are those whose version matters to the result.
    """
    cpu = _cpu_facts()
    kinds = {"avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_int8"}
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "trivec": __version__,
        "python": platform.python_version(),
        "cpu": cpu.get("model name", platform.processor() or platform.machine()),
        "core_count": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0,
        "instructions": " ".join(one for one in cpu.get("flags", "").split() if one in kinds),
        "masked": all(os.environ.get(name) == value for name, value in MASK.items()),
        "memory_gib": round(memory_bytes / 2**30, 1),
        "others_busy": _others_busy(),  # share of all cores; None: unknown
        "packages": {name: _version(name) for name in packages},
    }


def _others_busy() -> float | None:
    """Look for half a second, while nothing of ours runs: peers starved of a core look slow."""
    file, looks = Path("/proc/stat"), []
    if not file.exists():
        return None
    for _ in range(2):
        ticks = [int(word) for word in file.read_text().split("\n", 1)[0].split()[1:9]]
        looks.append((ticks[3] + ticks[4], sum(ticks)))  # idle, or waiting for a disk; of all
        time.sleep(LOOK_S)
    (idle_before, before), (idle_after, after) = looks
    return round(1 - (idle_after - idle_before) / (after - before), 2) if after > before else None


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def _cpu_facts() -> dict[str, str]:
    """The first processor's entry of /proc/cpuinfo; empty where there is no such file."""
    file = Path("/proc/cpuinfo")
    if not file.exists():
        return {}
    lines = file.read_text().split("\n\n", 1)[0].splitlines()
    return {name.strip(): value.strip() for name, _, value in (one.partition(":") for one in lines)}


def _commit() -> str:
    """The checkout's commit, with a plus where files differ from it; "unknown" outside of one."""
    here = Path(__file__).parent
    git = shutil.which("git")
    if git is None:
        return "unknown"
    try:
        said = subprocess.run(
            [git, "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"],
            cwd=here, capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return said.stdout.strip()
