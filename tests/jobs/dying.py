"""`trivec embed` that kills itself at a chosen step of what it puts on the disk.

Run as `python dying.py STEP ARGUMENT …`. Steps are the opening of a file to write, and what comes
before and after an fsync and a rename; with STEP 0 it lives, and says how many there were.
"""

import os
import signal
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

from trivec.cli import main

STEP = int(sys.argv.pop(1))
steps = count(1)


def step() -> None:
    if next(steps) == STEP:
        os.kill(os.getpid(), signal.SIGKILL)


def stepped(function: Callable[..., Any], *, after: bool = True) -> Callable[..., Any]:
    def call(*arguments: Any, **named: Any) -> Any:
        step()
        result = function(*arguments, **named)
        if after:
            step()
        return result

    return call


os.fsync = stepped(os.fsync)
Path.replace = stepped(Path.replace)  # type: ignore[method-assign]
Path.open = stepped(Path.open, after=False)  # type: ignore[method-assign]
sys.argv = ["trivec", "embed", *sys.argv[1:]]
try:
    main()
finally:
    sys.stdout.write(str(next(steps) - 1))
