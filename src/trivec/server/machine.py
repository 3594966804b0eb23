"""What the operating system gives this process: sockets, cores, memory and open files."""

import asyncio
import gc
import os
import socket
import ssl
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

from trivec.core.errors import SettingInvalid

BACKLOG = 1024  # connections the kernel accepts before we do
YOUNG_OBJECTS_MAX = 10_000  # allocations between two collections; a request makes few cycles
FILES = Path("/")


def listen(host: str, port: int, *, shared: bool = False, flag: str = "--port") -> socket.socket:
    """A listening socket on *host* and *port* (0: a free one). Raises `SettingInvalid`.

    It is ours and not granian's, so that a port in use is one clear line and port 0 is known from
    the start. *shared*: other processes of ours listen there, too; the kernel spreads connections.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as fault:
        raise SettingInvalid(f"host {host} is no address: {fault.strerror}") from fault
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as fault:
        listener.close()
        raise SettingInvalid(
            f"cannot listen on {host}:{port}: {os.strerror(fault.errno or 0)}. "
            f"Choose another {flag}" + (", or 0 for a free one." if flag == "--port" else ".")
        ) from fault
    listener.setblocking(False)
    return listener


def listen_shared(host: str, port: int, *, count: int) -> list[socket.socket]:
    """*count* sockets on one port, a process each. Raises `SettingInvalid`."""
    with listen(host, port) as alone:  # refused where another program shares the port
        port = alone.getsockname()[1]
    return [listen(host, port, shared=True) for _ in range(count)]


def check_certificate(cert: Path, key: Path) -> None:
    """Raise `SettingInvalid` for a certificate and key that TLS could not start with."""

    def no_password() -> str:
        raise ValueError("the key is encrypted; give one without a password")

    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key, password=no_password)
    except (ssl.SSLError, OSError, ValueError) as fault:
        raise SettingInvalid(
            f"tls_cert {cert} and tls_key {key} do not work together: {fault}"
        ) from fault


def usable_cores(*, allowed: int | None = None, files: Path = FILES) -> int:
    """Whole cores this process may keep busy, at least one.

    *allowed* is what the scheduler's affinity allows, asked for when None. A quota of 2.5 cores
    gives 2: a third thread would be throttled half of the time.
    """
    if allowed is None:  # macOS has no affinity
        affinity = getattr(os, "sched_getaffinity", None)
        allowed = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    cores = [allowed]
    for bound in _cgroup_bounds(
        files, "cpu", ["cpu.max"], ["cpu.cfs_quota_us", "cpu.cfs_period_us"]
    ):
        quota, _, period = bound.partition(" ")  # microseconds of CPU time in each period
        if quota.isdigit() and period:  # else "max" or -1
            cores.append(int(quota) // int(period))
    return max(1, min(cores))


def usable_memory_bytes(files: Path = FILES) -> int:
    """Bytes of memory this process may use: the machine's, or its cgroups' bound if that is less."""
    machine = [
        1024 * int(line.split()[1])
        for line in _lines(files / "proc/meminfo")
        if line.startswith("MemTotal:")
    ] or [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    bounds = _cgroup_bounds(files, "memory", ["memory.max"], ["memory.limit_in_bytes"])
    return min(machine + [int(bound) for bound in bounds if bound.isdigit()])


def _cgroup_bounds(files: Path, controller: str, v2: list[str], v1: list[str]) -> Iterator[str]:
    """The words of the bound of each cgroup around this process; *v2* and *v1* name its files."""
    root = files / "sys/fs/cgroup"
    for line in _lines(files / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2: one tree
            folder, names = root, v2
        elif controller in controllers.split(","):
            folder, names = root / controller, v1
        else:
            continue
        inner = PurePosixPath(path.lstrip("/"))
        for group in (inner, *inner.parents):  # inside a container only the root may exist
            yield " ".join(word for name in names for word in _lines(folder / group / name))


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except OSError:
        return []


async def tell_watchdog_forever() -> None:
    """Say to systemd that the event loop turns, where the unit has a `WatchdogSec`.

    See sd_notify(3). Any process of the service may say so: the unit has `NotifyAccess=all`.
    """
    address, period_us = os.environ.get("NOTIFY_SOCKET"), os.environ.get("WATCHDOG_USEC")
    if not address or not period_us:
        return
    if address.startswith("@"):  # an abstract socket
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.setblocking(False)
        while True:
            with suppress(OSError):  # its buffer is full, or it is being started again
                systemd.sendto(b"WATCHDOG=1", address)
            await asyncio.sleep(int(period_us) / 2e6)


def raise_file_limit() -> None:
    """Let this process and its children open as many files as allowed: a connection is one."""
    try:
        import resource
    except ImportError:  # Windows has none
        return
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):  # macOS grants less than it says
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def freeze_garbage_collector() -> None:
    """Take all loaded objects out of the garbage collector's walks; they stay until the end."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS_MAX, 20, 20)
