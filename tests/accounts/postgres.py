"""A Postgres server of the tests' own: in a folder of its own, on a free port, gone at the end.

Nothing of it outlives the tests, so it syncs nothing and lies in memory where there is enough; for
benchmarks it may be durable.
"""

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psycopg

from trivec.accounts.stores.engines import postgres_engines
from trivec.accounts.stores.sql import SqlStore

IN_MEMORY = Path("/dev/shm")  # of a container often too small
MEMORY_BYTES_MIN = 1 << 30
LATEST = "trivec_latest"  # a database with the latest schema, to be copied
NOT_DURABLE = "-c fsync=off -c full_page_writes=off -c max_wal_size=64MB -c shared_buffers=32MB"
INSTALLED = Path("/usr/lib/postgresql")
ROOT = 0


def binaries() -> Path | None:
    """The folder of the newest `initdb` and `postgres` of this machine; None where there is none."""
    found = shutil.which("initdb")
    folders = sorted(INSTALLED.glob("*/bin"), key=lambda path: int(path.parent.name))
    return Path(found).resolve().parent if found else folders[-1] if folders else None


@dataclass
class PostgresServer:
    """One server over one folder, which can be stopped and started again."""

    bin: Path
    folder: Path
    port: int
    user: str | None  # the server refuses root, so then it runs as somebody else
    is_durable: bool
    databases: int = field(default=0)
    is_running: bool = field(default=False)
    _has_latest: bool = field(default=False)

    def start(self) -> None:
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -k {self.folder}"
        options += "" if self.is_durable else f" {NOT_DURABLE}"
        self._control("start", "-o", options, "-l", str(self.folder / "log"))
        self.is_running = True

    def stop(self, *, mode: str = "immediate") -> None:
        self._control("stop", "-m", mode)
        self.is_running = False

    def new_database(self, *, template: str = "template1") -> str:
        """The URL of an empty database; the one before it is dropped."""
        self.sql("postgres", f"DROP DATABASE IF EXISTS trivec_{self.databases} WITH (FORCE)")
        self.databases += 1
        name = f"trivec_{self.databases}"
        self.sql("postgres", f"CREATE DATABASE {name} TEMPLATE {template}")
        return self.url(name)

    def upgraded_database(self) -> str:
        """The URL of a database with the latest schema and nothing in it."""
        if not self._has_latest:
            self.sql("postgres", f"CREATE DATABASE {LATEST}")
            engines = postgres_engines(self.url(LATEST))
            with closing(SqlStore(engines, upgrades_itself=False)) as store:
                store.upgrade()
            self._has_latest = True
        return self.new_database(template=LATEST)

    def url(self, database: str) -> str:
        return f"postgresql://trivec@127.0.0.1:{self.port}/{database}"

    def sql(self, database: str, statement: str) -> None:
        with psycopg.connect(self.url(database), autocommit=True) as connection:
            connection.execute(statement)

    def _control(self, *arguments: str) -> None:
        self._run("pg_ctl", "-D", str(self.folder / "data"), "-w", *arguments)

    def _run(self, program: str, *arguments: str) -> None:
        done = subprocess.run(
            [str(self.bin / program), *arguments],
            user=self.user,
            cwd=self.folder,
            env={"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, f"{program}: {done.stdout}{done.stderr}"


@contextmanager
def postgres_server(bin_folder: Path, *, is_durable: bool = False) -> Iterator[PostgresServer]:
    """A running server without passwords, on the loopback address only."""
    place = None if is_durable or not os.access(IN_MEMORY, os.W_OK) else IN_MEMORY
    if place is not None and shutil.disk_usage(place).free < MEMORY_BYTES_MIN:
        place = None
    folder = Path(tempfile.mkdtemp(prefix="trivec-postgres-", dir=place))
    user = "postgres" if os.geteuid() == ROOT else None
    if user is not None:
        shutil.chown(folder, user)
    server = PostgresServer(bin_folder, folder, free_port(), user, is_durable)
    try:
        made = ("-D", str(folder / "data"), "-U", "trivec", "--auth=trust", "-E", "UTF8")
        server._run("initdb", *made, "--no-sync")
        server.start()
        try:
            yield server
        finally:
            if server.is_running:
                server.stop()
    finally:
        shutil.rmtree(folder)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
