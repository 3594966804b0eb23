"""A Postgres server of the tests' own: in a folder of its own, on a free port, gone at the end."""

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psycopg

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
    databases: int = field(default=0)

    def start(self) -> None:
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -k {self.folder} -c fsync=on"
        self._control("start", "-o", options, "-l", str(self.folder / "log"))

    def stop(self, *, mode: str = "immediate") -> None:
        self._control("stop", "-m", mode)

    def new_database(self) -> str:
        """The URL of an empty database."""
        self.databases += 1
        name = f"trivec_{self.databases}"
        self.sql("postgres", f"CREATE DATABASE {name}")
        return self.url(name)

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
def postgres_server(bin_folder: Path) -> Iterator[PostgresServer]:
    """A running server without passwords, on the loopback address only."""
    folder = Path(tempfile.mkdtemp(prefix="trivec-postgres-"))
    user = "postgres" if os.geteuid() == ROOT else None
    if user is not None:
        shutil.chown(folder, user)
    server = PostgresServer(bin_folder, folder, _free_port(), user)
    try:
        server._run(
            "initdb", "-D", str(folder / "data"), "-U", "trivec", "--auth=trust", "-E", "UTF8"
        )
        server.start()
        try:
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(folder)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
