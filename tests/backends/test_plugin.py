"""The plugin does nothing to the thread that opens it."""

import subprocess
import sys

ENDS_OUT_OF_ORDER = """
import os, signal
from trivec.backends.openvino.session import open_core
first, second = open_core(), open_core()
del first
del second
signal.signal(signal.SIGTERM, lambda *_: print("heard"))
os.kill(os.getpid(), signal.SIGTERM)
"""


def test_a_signal_is_heard_after_cores_that_ended_out_of_order() -> None:
    ran = subprocess.run(
        [sys.executable, "-c", ENDS_OUT_OF_ORDER], capture_output=True, text=True, check=False
    )
    assert (ran.returncode, ran.stdout) == (0, "heard\n"), ran.stderr
