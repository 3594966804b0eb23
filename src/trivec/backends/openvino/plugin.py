"""OpenVINO's CPU plugin, opened so that it leaves the calling thread's signal stack as it was.

With each `ov.Core` the plugin (2026.4) gives the calling thread a signal stack of its own, and takes
it back with the core. When cores do not end in the reverse order of their making, the thread is left
with memory that is gone, and the next signal ends the process: a Ctrl-C as a segmentation fault.
"""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import openvino as ov


class _Stack(ctypes.Structure):
    """`stack_t` of sigaltstack(2) on Linux."""

    _fields_ = (
        ("start", ctypes.c_void_p),
        ("flags", ctypes.c_int),
        ("size", ctypes.c_size_t),
    )


def open_core() -> ov.Core:
    """A core whose CPU plugin is loaded."""
    with _signal_stack_kept():
        core = ov.Core()
        core.get_property("CPU", "FULL_DEVICE_NAME")  # the plugin is loaded at the first question
    return core


@contextmanager
def _signal_stack_kept() -> Iterator[None]:
    """Give the thread back, at the end of the block, the signal stack that it came with."""
    if sys.platform != "linux":
        yield
        return
    libc, before = ctypes.CDLL(None, use_errno=True), _Stack()
    if libc.sigaltstack(None, ctypes.byref(before)) != 0:
        raise OSError(ctypes.get_errno(), "sigaltstack")
    try:
        yield
    finally:
        libc.sigaltstack(ctypes.byref(before), None)
