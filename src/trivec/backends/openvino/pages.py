"""Gives memory back to the system: mapped weights once they are packed, and what malloc holds free.

A mapped page that is let go is read from its file again if anyone asks: nothing can be lost.
"""

import ctypes
import mmap
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray


def let_go(mappings: Iterable[mmap.mmap]) -> None:
    """Drop the pages of *mappings* from memory."""
    for mapping in mappings:
        if hasattr(mapping, "madvise"):  # Linux and macOS
            mapping.madvise(mmap.MADV_DONTNEED)


def mappings_of(arrays: Iterable[NDArray[np.generic]]) -> tuple[mmap.mmap, ...]:
    """Every mapped file behind *arrays*, once; memory of their own is left alone."""
    found = {id(one): one for array in arrays if (one := mapping_of(array)) is not None}
    return tuple(found.values())


def mapping_of(array: NDArray[np.generic]) -> mmap.mmap | None:
    """The mapped file that *array* is a view of; None where it is memory of its own."""
    held: object = array
    while isinstance(held, np.ndarray):
        held = held.base
    if isinstance(held, memoryview):
        held = held.obj
    return held if isinstance(held, mmap.mmap) else None


def return_free() -> None:
    """Let malloc give its free pages to the system: some ms, so not for the way of a short row.

    glibc keeps what a thread has freed for that thread; after loading, and after long rows, that
    is hundreds of MB. Other allocators have no such call, and it does nothing there.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))
