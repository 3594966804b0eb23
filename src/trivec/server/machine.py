"""How much of this machine is ours, in cores and in bytes: the least of what bounds us."""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

FILES = Path("/")


def usable_cores(*, allowed: int | None = None, files: Path = FILES) -> int:
    """Whole cores this process may keep busy, at least one.

    *allowed* is what the scheduler's affinity allows, asked for when None. A quota of 2.5 cores
    gives 2: a third thread would be throttled half of the time.
    """
    quotas = [int(quota) for quota in cgroup_quotas(files)]
    return max(1, min([_affinity() if allowed is None else allowed, *quotas]))


def raise_file_limit() -> None:
    """Let this process and its children open as many files as they may: a connection is one."""
    try:
        import resource
    except ImportError:  # Windows has none
        return
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):  # macOS grants less than it says
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def cgroup_quotas(files: Path = FILES) -> Iterator[float]:
    """Cores' worth of time that each cgroup around this process grants, where it sets a bound."""
    root = files / "sys/fs/cgroup"
    for line in _lines(files / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2: one tree
            for folder in _upwards(root, path):
                yield from _quota(_lines(folder / "cpu.max"))
        elif "cpu" in controllers.split(","):
            for folder in _upwards(root / "cpu", path):
                quota = _lines(folder / "cpu.cfs_quota_us")
                period = _lines(folder / "cpu.cfs_period_us")
                yield from _quota([f"{quota[0]} {period[0]}"] if quota and period else [])


def usable_memory_bytes(files: Path = FILES) -> int:
    """Bytes of memory that this process may use: the machine's, or a cgroup's around us if less."""
    root = files / "sys/fs/cgroup"
    bounds = [
        1024 * int(line.split()[1])
        for line in _lines(files / "proc/meminfo")
        if line.startswith("MemTotal:")
    ] or [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for line in _lines(files / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            found = [folder / "memory.max" for folder in _upwards(root, path)]
        elif "memory" in controllers.split(","):
            found = [folder / "memory.limit_in_bytes" for folder in _upwards(root / "memory", path)]
        else:
            continue
        bounds += [int(bound) for file in found for bound in _lines(file) if bound.isdigit()]
    return min(bounds)


def _quota(lines: list[str]) -> Iterator[float]:
    for line in lines:
        quota, _, period = line.partition(" ")
        if quota not in ("max", "-1"):
            yield int(quota) / int(period)


def _upwards(root: Path, path: str) -> Iterator[Path]:
    """*path* below *root* and everything above it; inside a container only *root* may exist."""
    inner = PurePosixPath(path.lstrip("/"))
    for folder in (inner, *inner.parents):
        yield root / folder


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except OSError:
        return []


def _affinity() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS has none
        return os.cpu_count() or 1
