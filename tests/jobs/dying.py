"""`trivec embed` that kills itself at a chosen step of what it puts on the disk.

Run as `python dying.py STEP ARGUMENT …`. A file of the job's has five steps: before it is opened,
and before and after it is flushed to the disk and renamed.
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


def stepped(function: Callable[..., Any], *, after: bool = True) -> Callable[..., Any]:
    """*function*, of a file or its descriptor, with a step before and maybe one after it."""

    def call(file: Path | int, *arguments: Any, **named: Any) -> Any:
        path = str(file) if isinstance(file, Path) else os.readlink(f"/proc/self/fd/{file}")
        is_of_job = ".parts/" in path and path.endswith(".tmp")

        def step() -> None:
            if is_of_job and next(steps) == STEP:
                os.kill(os.getpid(), signal.SIGKILL)

        step()
        result = function(file, *arguments, **named)
        if after:
            step()
        return result

    return call


os.fsync = stepped(os.fsync)
Path.replace = stepped(Path.replace)  # type: ignore[method-assign]
Path.open = stepped(Path.open, after=False)  # type: ignore[method-assign]
sys.argv = ["trivec", "embed", *sys.argv[1:]]
main()
