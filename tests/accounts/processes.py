"""Starts the driver as a process of its own, as root without its privileges where that matters."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT_FOLDER = Path(__file__).resolve().parents[2]
LONG_FORMS = "TRIVEC_LONG_TESTS"  # set it to run the long form of a test
ROOT = 0
OVER_MODES = "-dac_override,-dac_read_search,-fowner"  # what lets root write where none may
WITHOUT_PRIVILEGE = ["setpriv", "--bounding-set", OVER_MODES, "--inh-caps", OVER_MODES]


ON_A_DISK_OF_ITS_OWN = (  # gone with the process; its folder is below /proc/PID/root
    'mount -t tmpfs -o size="$0" none "$1" && shift && exec "$@"'
)


def long_or_short(*, long: int, short: int) -> int:
    """How often to do something: much more where the long forms were asked for."""
    return long if os.environ.get(LONG_FORMS) else short


@contextmanager
def driver(
    folder: Path, *, obeys_modes: bool = False, disk_bytes: int | None = None
) -> "Iterator[subprocess.Popen[str]]":
    """A running driver that has said that it started; killed at the end if it still runs.

    *obeys_modes*: the modes of files bind it even when it is root. *disk_bytes*: it has the folder
    on a disk of this size that nobody else sees.
    """
    prefix = WITHOUT_PRIVILEGE if obeys_modes and os.geteuid() == ROOT else []
    if disk_bytes is not None:
        rights = "--mount" if os.geteuid() == ROOT else "-Urm"
        mounted = ["unshare", rights, "sh", "-c", ON_A_DISK_OF_ITS_OWN, str(disk_bytes)]
        prefix = [*mounted, str(folder)]
    process = subprocess.Popen(
        [*prefix, sys.executable, "-m", "tests.accounts.driver", str(folder)],
        cwd=ROOT_FOLDER,
        env=os.environ | {"PYTHONPATH": "src", "PYTHONDONTWRITEBYTECODE": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "started\n"
            yield process
        finally:
            process.kill()
