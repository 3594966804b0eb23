"""Cores and memory: the least of what bounds us, on faked files."""

from pathlib import Path

import pytest

from trivec.server.machine import usable_cores, usable_memory_bytes


@pytest.mark.parametrize(
    ("files", "allowed", "cores"),
    [
        pytest.param({}, 8, 8, id="no-cgroups"),
        pytest.param({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, 8, 8,
            id="version-2-without-a-quota"),
        pytest.param({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "250000 100000\n"}, 8, 2,
            id="two-and-a-half-cores-are-two"),
        pytest.param({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"}, 8, 1,
            id="half-a-core-is-one"),
        pytest.param({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "900000 100000\n"}, 2, 2,
            id="affinity-is-smaller"),
        pytest.param({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "300000 100000\n",
             "sys/fs/cgroup/a/b/cpu.max": "max 100000\n"}, 8, 3,
            id="a-quota-on-the-cgroup-above"),
        pytest.param({"proc/self/cgroup": "4:cpu,cpuacct:/\n",
             "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "400000\n",
             "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"}, 8, 4,
            id="version-1"),
        pytest.param({"proc/self/cgroup": "4:cpu,cpuacct:/\n",
             "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
             "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"}, 8, 8,
            id="version-1-without-a-quota"),
    ],
)  # fmt: skip
def test_usable_cores(tmp_path: Path, files: dict[str, str], allowed: int, cores: int) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert usable_cores(allowed=allowed, files=tmp_path) == cores


@pytest.mark.parametrize(
    ("group", "bounds", "found"),
    [
        pytest.param("0::/\n", {}, 8 << 30, id="no-bound"),
        pytest.param("0::/\n", {"memory.max": "max\n"}, 8 << 30, id="version-2-without-a-bound"),
        pytest.param("0::/\n", {"memory.max": "1073741824\n"}, 1 << 30, id="version-2"),
        pytest.param("0::/a/b\n", {"a/memory.max": "1048576\n"}, 1 << 20, id="a-cgroup-above"),
        pytest.param("3:memory:/\n", {"memory/memory.limit_in_bytes": "2097152\n"}, 2 << 20,
            id="version-1"),
        pytest.param("3:memory:/\n", {"memory/memory.limit_in_bytes": "9223372036854771712\n"},
            8 << 30, id="version-1-without-a-bound"),
    ],
)  # fmt: skip
def test_usable_memory(tmp_path: Path, group: str, bounds: dict[str, str], found: int) -> None:
    files = {"proc/meminfo": "MemTotal:        8388608 kB\n", "proc/self/cgroup": group}
    files |= {f"sys/fs/cgroup/{name}": text for name, text in bounds.items()}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert usable_memory_bytes(tmp_path) == found
